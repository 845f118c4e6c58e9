"""How the learning rate and the L0 aimed at move over a run. All are functions of the share of the run that
is done.
"""

from train.config import TrainConfig


def lr_factor(config: TrainConfig, share: float) -> float:
    """Factor of the learning rates: up over `warmup`, level, and linearly down to zero over `decay`."""
    rise = share / config.warmup if config.warmup else 1.0
    fall = (1 - share) / config.decay if config.decay else 1.0
    return max(0.0, min(1.0, rise, fall))


def l0_aim(config: TrainConfig, share: float) -> float:
    """The L0 that the sparsity term aims at: linearly from `l0_start` times the target to the target over
    `l0_anneal`.
    """
    done = min(1.0, share / config.l0_anneal) if config.l0_anneal else 1.0
    return config.l0 * (config.l0_start + (1 - config.l0_start) * done)
