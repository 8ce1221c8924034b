"""The first study: does a run say early that its learning rate is too high?"""
