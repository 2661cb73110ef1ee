"""FedNova (arXiv:2007.07481): silos that made more steps in a round do not pull the model towards their own optimum.

With plain averaging a silo's update counts by its samples and once more by its number of steps. FedNova divides each
update by the length of its walk, ||a_i||_1, and multiplies the mean by the mean length (section 5):

    sum_i p_i tau_eff / ||a_i||_1 d_i,    tau_eff = sum_i p_i ||a_i||_1,    p_i = n_i / n

a_i says how much each gradient of silo i's round is in its update: 1 each with plain SGD, so that ||a_i||_1 is the
number of steps; momentum and the proximal term make it another. No silo is asked for it: it follows from what it was
ordered to do and from its number of samples, which is bounded by what it registered.
"""

from __future__ import annotations

import numpy as np

from gptfl_dist.aggregation.updates import Updates, Vector
from gptfl_dist.config.plan import LocalTraining, batch_count
from gptfl_dist.config.strategy import Strategy


def fednova(updates: Updates, strategy: Strategy) -> Vector:
    """The weight of each update."""
    walked = zip(updates.trainings, updates.samples, strict=True)
    lengths = np.array([length(training, samples) for training, samples in walked])
    shares = updates.shares
    weights: Vector = shares * (shares @ lengths) / lengths
    return weights


def length(training: LocalTraining, samples: int) -> float:
    """||a||_1 of a silo's local training: how far it walks if every gradient is 1 and a step of rate 1 goes so far.

    With momentum rho, proximal strength mu and rate eta, where v is the velocity and s the way so far:
    v' = rho v + 1 - eta mu s and s' = s + v'. For one of them alone it is the closed form of the paper's section 4.
    """
    steps = training.epochs * batch_count(samples, training.batch_size)
    momentum, pull = training.momentum, training.learning_rate * training.proximal
    once = np.array([[momentum, -pull, 1.0], [momentum, 1.0 - pull, 1.0], [0.0, 0.0, 1.0]])  # of (v, s, 1)
    return float(np.linalg.matrix_power(once, steps)[1, 2])
