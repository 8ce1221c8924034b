"""The second study: does anything say that a spike comes?"""
