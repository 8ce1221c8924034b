"""The trainer with a model so small that several processes fit into a test."""

import dataclasses

import model
import train

if __name__ == "__main__":
    small = {"layers": 1, "width": 32, "heads": 2, "context": 32}
    model.SIZES["tiny"] = dataclasses.replace(model.SIZES["tiny"], **small)
    train.main()
