"""Two processes under gloo: the result of one, no silent hang where one dies, and refusal of different work."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import sbot

from . import KINDS, STEPS, Child, Dropping, at, state, train
from . import few_samples as few_samples


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def joined(say: Any, rank: int, where: int, size: int, work: str, args: tuple[Any, ...]) -> Any:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(where)}
    with sbot.together("gloo") as group:
        return globals()[work](say, group, *args)


def pair(work: str, *args: Any) -> list[Child]:
    where = port()
    return [Child(joined, rank, where, 2, work, args) for rank in range(2)]


def learned(say: Any, group: Any, kind: str, folder: str, accumulate: int = 1) -> dict[str, Any]:
    bridge = train(kind, folder or None, accumulate=accumulate)
    nets = [s.net.state_dict() for s in (bridge.forward, bridge.backward) if s.net is not None]
    flat = torch.cat([value.flatten() for one in nets for value in one.values()])
    return {"weights": flat.tolist(), "history": list(bridge.report.history)}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_does(kind: str, tmp_path: Path) -> None:
    alone = learned(None, None, kind, "")
    said = []
    for child in pair("learned", kind, str(tmp_path)):
        code, word = child.end(120)
        assert code == 0, word
        said.append(word[1])
    assert said[0] == said[1]  # the processes agree to the bit
    one, two = torch.tensor(alone["weights"]), torch.tensor(said[0]["weights"])
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)  # the order of sums, through 80 steps of AdamW
    assert state(tmp_path)[0]["done"] == STEPS[kind]
    # a run of two processes goes on in one
    assert train(kind, tmp_path).report.iterations == STEPS[kind]


def test_parts_of_a_batch_add_up() -> None:
    one, two = (torch.tensor(learned(None, None, "dsbm", "", parts)["weights"]) for parts in (1, 3))
    assert not torch.equal(one, two)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def randomly(say: Any, group: Any) -> list[float]:
    from sbot.neural.fit import own_randomness

    with own_randomness(torch.device("cpu"), 7 * group.size + group.rank):
        mine = torch.rand(4).tolist()
    train("dsbm", None, Dropping(), steps=3)
    return mine


def test_what_networks_draw_differs_between_processes() -> None:
    said = [child.end(120) for child in pair("randomly")]
    assert [code for code, _ in said] == [0, 0], said
    assert said[0][1][1] != said[1][1][1]


def dying(say: Any, group: Any, folder: str) -> None:
    if group.rank == 1:
        train("dsbm", folder, callbacks=(at(30, lambda: os.kill(os.getpid(), signal.SIGKILL)),))
    else:
        train("dsbm", folder)


def test_the_survivor_of_a_killed_process_raises_and_the_run_goes_on(tmp_path: Path) -> None:
    first, second = pair("dying", str(tmp_path))
    assert second.end(120)[0] == -signal.SIGKILL
    code, said = first.end(120)
    assert code == 1 and said[1] == "RuntimeError" and "another process of the group is gone" in said[2], said
    assert 0 < state(tmp_path)[0]["done"] <= 30
    assert train("dsbm", tmp_path).report.iterations == STEPS["dsbm"]


def differing(say: Any, group: Any) -> None:
    train("dsbm", None, seed=group.rank)


def test_processes_with_different_settings_are_refused() -> None:
    for child in pair("differing"):
        code, said = child.end(120)
        assert code == 1 and said[1] == "InvalidProblem" and "different problems or settings" in said[2], said


def stopped(say: Any, group: Any, folder: str) -> None:
    calls = (at(30, lambda: os.kill(os.getpid(), signal.SIGTERM)),) if group.rank == 1 else ()
    train("dsbm", folder, callbacks=calls)


def test_a_signal_to_one_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    codes = [child.end(120)[0] for child in pair("stopped", str(tmp_path))]
    assert codes == [143, 143]
    assert 30 <= state(tmp_path)[0]["done"] <= 31
