"""Where rows go in code that repeats, reorders or drops them."""

import pytest
import torch

from flexip_core.network.moves import followed

STILL = (0, 1, 2, 3, 4, 5)


def assigned(q):
    out = torch.empty(6, 5, 4)
    out[:3], out[3:] = q[3:], q[:3]
    return out


CASES = {
    "as it is": (lambda q: q, STILL),
    "numbers computed from each row": (lambda q: q * 2 + 1, STILL),
    "an addition from elsewhere": (
        lambda q: q + torch.cat([torch.ones(6, 5, 3), q[..., :1]], -1) @ torch.ones(4, 4),
        STILL,
    ),
    "two copies averaged": (lambda q: (q.clone() + q) / 2, STILL),
    "half repeated": (
        lambda q: torch.cat([q.chunk(2)[0], q.chunk(2)[1].repeat(3, 1, 1)]),
        (0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5),
    ),
    "half repeated and scaled": (lambda q: torch.cat([q[:1], q[3:].tile(2, 1, 1) * 0.5]), (0, 3, 4, 5, 3, 4, 5)),
    "each row repeated": (lambda q: q.repeat_interleave(2, 0), (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)),
    "a view repeated": (lambda q: q[None].expand(2, -1, -1, -1).reshape(-1, 5, 4), STILL * 2),
    "stacked": (lambda q: torch.stack([q[3], q[0]]), (3, 0)),
    "turned round": (lambda q: q.flip(0), STILL[::-1]),
    "chosen by numbers": (lambda q: q[[5, 5, 1]], (5, 5, 1)),
    "chosen by a condition": (lambda q: q[torch.tensor([1, 0, 1, 1, 0, 0]).bool()], (0, 2, 3)),
    "every other one": (lambda q: q[::2], (0, 2, 4)),
    "written into new memory": (assigned, (3, 4, 5, 0, 1, 2)),
    "in another precision": (lambda q: torch.cat([q[2:], q[:2]]).half(), (2, 3, 4, 5, 0, 1)),
    "cut into windows": (lambda q: q[:, :4].reshape(12, 2, 4), (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)),
    "with rows of its own": (lambda q: torch.cat([q, torch.zeros(2, 5, 4)]), None),
    "rows mixed": (lambda q: q + q.flip(0), None),
    "tokens exchanged between rows": (lambda q: torch.cat([q[:, :2], q.flip(0)[:, 2:]], 1), None),
    "rows averaged away": (lambda q: q.view(2, 3, 5, 4).mean(0), None),
    "nothing of them": (lambda q: torch.ones(6, 5, 4), None),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_found_again_and_the_result_is_what_it_was(case, mode):
    move, expected = CASES[case]
    with mode():
        q = torch.randn(6, 5, 4)
        (result, other), rows = followed(lambda: (move(q), "other"), q)
        assert rows == expected and other == "other"
        assert torch.equal(result, move(q)) and torch.equal(q, q.clone())


def test_equal_rows_are_told_apart():
    """A sweep's rows share their noise; and 300 rows are more than a small number format can name."""
    q = torch.ones(300, 2, 3, dtype=torch.bfloat16)
    assert followed(lambda: (q.flip(0),), q)[1] == tuple(range(299, -1, -1))
