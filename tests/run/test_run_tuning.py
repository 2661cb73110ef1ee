"""The learning rate is chosen from the grid by trials, and a rate that cannot be trained with loses, no more."""

from __future__ import annotations

from collections.abc import Callable

from support import Commands, Federation


def test_a_rate_that_diverges_is_out_and_the_run_goes_on(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    training = {"batch_size": 8, "learning_rate": [0.1, 1e30]}
    tuned = federation(training=training, tuning={"rounds": 1})
    command = gptfl.start("run", tuned.path)
    assert command.wait() == 0, command.stderr
    assert "learning rate 1e+30 is out: its trial failed" in command.stderr
    assert "learning rate 0.1 chosen on validation data" in command.stderr
    summary = tuned.summary()
    assert summary["arms"]["fedavg_random"]["learning_rate"] == 0.1
    assert summary["tuning"]["fedavg_random"]["1e+30"] is None
    assert summary["tuning"]["fedavg_random"]["0.1"] >= 0.5


def test_a_grid_without_any_usable_rate_ends_the_run_with_what_to_do(
    gptfl: Commands, federation: Callable[..., Federation]
) -> None:
    hopeless = federation(training={"batch_size": 8, "learning_rate": [1e29, 1e30]}, tuning={"rounds": 1})
    command = gptfl.start("run", hopeless.path)
    assert command.wait() == 8
    assert "no learning rate of the grid could be trained with" in command.stderr
    assert "Traceback" not in command.stderr
