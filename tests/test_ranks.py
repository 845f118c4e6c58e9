"""Ranks: what real processes tell one another through the store and the process group."""

import json
import socket

import pytest
import torch
from ranks_processes import Processes

from activations.ranks import RankLost, Ranks, alone, open_ranks
from activations.watch import hang_seconds
from sae.errors import UserError

CALLS = """
import json, threading, torch
from activations.ranks import open_ranks
from sae.errors import UserError

said = {}
with open_ranks() as ranks:
    me, world = ranks.rank, ranks.world
    with open_ranks() as again:
        said["same"] = again is ranks
    said["who"] = [me, world, ranks.local_rank, ranks.first, str(ranks.device)]
    said["shared"] = [ranks.share("numbers", {"me": me, "turn": turn}) for turn in range(3)]
    ranks.agree("settings", {"seed": 1, "sites": ["a", "b"]})
    try:
        ranks.agree("settings", {"seed": 1 if me else 2, "width": 16, **({"late": True} if me == 1 else {})})
    except UserError as error:
        said["refused"] = str(error)

    # rank s sends s + 3 * r numbers to rank r, so lengths differ and the first is empty
    parts = [torch.arange(me + 3 * to, dtype=torch.bfloat16) + 1000 * me for to in range(world)]
    parts[0] = torch.tensor([[-0.0, float("nan"), 2.0 ** -133]], dtype=torch.bfloat16)[:, : 3 * me]
    got = ranks.swap(parts)
    said["swapped"] = [part.view(torch.int16).tolist() for part in got]
    odd = ranks.swap([torch.full((to,), me, dtype=torch.uint8) for to in range(world)])
    said["odd"] = [part.tolist() for part in odd]

    total = torch.tensor([1.0, 10.0]) * (me + 1)
    ranks.add(total)
    said["sum"] = total.tolist()
    groups = [ranks.group([0, world - 1]), ranks.group([world - 1])]
    for group in groups:
        if me in group.members:
            part = torch.tensor([me + 1])
            ranks.add(part, group)
            said.setdefault("parts", []).append(part.item())

    lane, heard = ranks.lane(), []
    def beside():
        for turn in range(50):
            heard.append(sum(part.sum().item() for part in lane.swap([torch.ones(turn)] * world)))
            lane.share("lane", turn)
            lane.beat()
    thread = threading.Thread(target=beside)
    thread.start()
    for turn in range(50):
        ones = torch.ones(1000)
        ranks.add(ones)
        assert ranks.share("main", [turn, me]) == [[turn, r] for r in range(world)]
        assert bool((ones == world).all())
        ranks.beat()
    with ranks.busy("waiting for the lane"):
        thread.join()
    said["lane"] = heard
print(json.dumps(said))
"""


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_agree_swap_and_add(world):
    ends = Processes(world, CALLS).finish()
    assert [(code, err) for code, _, err in ends] == [(0, "")] * world
    said = [json.loads(out) for _, out, _ in ends]
    for me, one in enumerate(said):
        assert one["same"]
        assert one["who"] == [me, world, me, me == 0, "cpu"]
        assert one["shared"] == [[{"me": r, "turn": turn} for r in range(world)] for turn in range(3)]
        assert "seed is 2 on rank 0 (" in one["refused"] and "late is missing on rank" in one["refused"]
        assert "width" not in one["refused"]
        assert one["swapped"] == [sent(sender, me) for sender in range(world)]
        assert one["odd"] == [[sender] * me for sender in range(world)]
        assert one["sum"] == [sum(range(1, world + 1)), 10 * sum(range(1, world + 1))]
        assert one.get("parts") == {0: [1 + world], world - 1: [1 + world, world]}.get(me)
        # the bytes of 1.0 are 0, 0, 128 and 63
        assert one["lane"] == [world * turn * (128 + 63) for turn in range(50)]


def sent(sender, to):
    if to == 0:
        numbers = torch.tensor([-0.0, float("nan"), 2.0**-133], dtype=torch.bfloat16)[: 3 * sender]
    else:
        numbers = torch.arange(sender + 3 * to, dtype=torch.bfloat16) + 1000 * sender
    return numbers.view(torch.int16).tolist()


def test_a_world_of_one_answers_at_once(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_ranks() as ranks:
        assert isinstance(ranks, Ranks) and not torch.distributed.is_initialized()
        assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    ranks = alone()
    assert ranks.share("x", (1, 2)) == [[1, 2]]
    ranks.agree("x", {"seed": 1})
    rows = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(ranks.swap([rows])[0].view(torch.float64), rows.reshape(-1))
    with pytest.raises(ValueError, match="a part for each of 1 ranks, not 2"):
        ranks.swap([rows, rows])
    before = rows.clone()
    ranks.add(rows, ranks.group([0]))
    ranks.beat()
    with ranks.lane().busy("nothing"):
        assert torch.equal(rows, before)


def test_a_world_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE means several ranks.*Start the command with torchrun"):
        open_ranks().__enter__()


@pytest.mark.parametrize(
    ("rank", "must"), [(0, "rank 0 must be able to open a store"), (1, "rank 1 must be able to reach")]
)
def test_a_port_in_use_and_one_without_a_store_are_one_clear_error(monkeypatch, rank, must):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        if rank:
            server.close()
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
        for name, value in (*place.items(), ("MASTER_ADDR", "127.0.0.1"), ("JUMPSCOPE_HANG_SECONDS", "2")):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(RankLost, match=f"{must}.*127.0.0.1:{port}.*Choose a free port") as refused:
            open_ranks().__enter__()
    # nobody else can say it
    assert (refused.value.code, refused.value.speaker) == (2, rank)


@pytest.mark.parametrize("text", ["soon", "0", "inf", "nan"])
def test_a_time_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("JUMPSCOPE_HANG_SECONDS", text)
    with pytest.raises(UserError, match="must be a number of seconds"):
        hang_seconds()
