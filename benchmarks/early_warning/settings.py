"""The models, data and optimizers of both studies."""

from typing import NamedTuple


class Setting(NamedTuple):
    """One kind of run; the defaults are as where the rule was found.

    Attributes:
      layers: blocks of the model.
      width: of its residual stream.
      batch: rows of 64 bytes per step.
      data: which bytes.
      warmup: steps to the peak of the learning rate.
      b1: Adam's β₁.
      b2: its β₂.
      eps: its ε.
      weight_decay: decoupled.
      final: learning rate at the end of the cosine, as a share of the peak.
      clip: limit of the gradient norm.
      normalised: whether the model has its layer norms.
      zero_head: whether the logits start at 0 and the tokens loud, as in
        ``examples/gpt``; else as in GPT-2.
    """

    layers: int = 2
    width: int = 64
    batch: int = 8
    data: str = "source code"
    warmup: int = 30
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 0.0
    weight_decay: float = 0.1
    final: float = 0.1
    clip: float = 1.0
    normalised: bool = True
    zero_head: bool = False

    @property
    def shape(self) -> "Setting":
        """What a program is compiled for."""
        return Setting(
            self.layers,
            self.width,
            self.batch,
            normalised=self.normalised,
            zero_head=self.zero_head,
        )


SETTINGS = {
    "as it was found": Setting(),
    "1 layer of 32": Setting(layers=1, width=32),
    "4 layers of 96": Setting(layers=4, width=96),
    "warm-up 10": Setting(warmup=10),
    "warm-up 60": Setting(warmup=60),
    "β₂ = 0.99": Setting(b2=0.99),
    "β₂ = 0.999": Setting(b2=0.999),
    "β = 0.8, 0.95": Setting(b1=0.8),
    "β = 0.95, 0.98": Setting(b1=0.95, b2=0.98),
    "batch 4": Setting(batch=4),
    "batch 32": Setting(batch=32),
    "Markov chain": Setting(data="Markov chain"),
    "English": Setting(data="English"),
    "no weight decay": Setting(weight_decay=0.0),
    "ε = 1e-8": Setting(eps=1e-8),
    "constant rate": Setting(final=1.0),
    "head starts at 0": Setting(zero_head=True),
    "head starts at 0, β₂ = 0.999": Setting(zero_head=True, b2=0.999),
}
QUICK = ("1 layer of 32",)

_SPIKING = Setting(clip=float("inf"), final=1.0, normalised=False, zero_head=True)
_SPIKING_999 = _SPIKING._replace(b2=0.999)
# By β₂: name, setting, rate after the warm-up.
SPIKING = {
    "0.95": {
        "rate 2e-2": (_SPIKING, 2e-2),
        "rate 2.5e-2": (_SPIKING, 2.5e-2),
        "rate from 1e-2 to 3e-2": (_SPIKING._replace(final=3.0), 1e-2),
    },
    "0.999": {
        "rate 1.5e-2": (_SPIKING_999, 1.5e-2),
        "rate 2e-2": (_SPIKING_999, 2e-2),
        "rate from 7e-3 to 2.1e-2": (_SPIKING_999._replace(final=3.0), 7e-3),
    },
}

_SMALL = _SPIKING._replace(layers=1, width=32)
QUICK_SPIKING = {"0.95": {"1 layer of 32, rate 1e-1": (_SMALL, 1e-1)}}
