"""Batches come one ahead of the step, in parts where a step is computed in parts, and none of that changes what is trained."""

import contextlib
import threading

import pytest
import torch
import training_fakes as fakes

from flexip_core.training import ahead
from flexip_core.training.ahead import Ahead, mapped
from flexip_core.training.data import Batch
from flexip_core.training.loop import Trainer
from flexip_core.training.progress import words
from flexip_core.training.ranks import Ranks

CPU = torch.device("cpu")


def batch_of(value: float) -> Batch:
    references = {"cls": torch.full((1, 2), value), "pictures": torch.full((1, 3), value)}
    return Batch(torch.full((1,), value), references, [("a",)], torch.zeros(1, dtype=torch.long))


# --- parts


@pytest.fixture
def doubles():
    """Sums in another order differ by 1e-16 then, and not by float32's 1e-7 per term."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_a_step_in_parts_is_the_step_of_the_large_batch(tmp_path, doubles, accumulate):
    base = fakes.FakeBase()

    def one_step(parts):
        trainer = Trainer(fakes.config(tmp_path, batch=8, accumulate=parts), base, fakes.pairs())
        step = trainer.step()
        return step, {key: p.grad.clone() for key, p in trainer.parameters.items()}, trainer.meter.sums

    whole, gradients, sums = one_step(1)
    step, in_parts, sums_of_parts = one_step(accumulate)
    assert abs(step.loss - whole.loss) < 1e-6 * abs(whole.loss)
    one, other = (torch.cat([gradient.flatten() for gradient in own.values()]) for own in (gradients, in_parts))
    assert (other - one).norm() <= 1e-6 * one.norm() > 0
    torch.testing.assert_close(sums_of_parts, sums, rtol=1e-6, atol=1e-6)


def test_parts_are_those_of_each_rank_and_a_part_draws_its_rows_alone(tmp_path):
    rows = []

    class Source:
        phrases = fakes.PHRASES

        def __init__(self):
            self.own = fakes.pairs()
            self.views, self.pictures = self.own.views, self.own.pictures

        def batch(self, kinds, generator, wanted):
            rows.append((len(kinds), wanted))
            return self.own.batch(kinds, generator, wanted)

    trainer = Trainer(fakes.config(tmp_path, batch=8, accumulate=2), fakes.FakeBase(), Source(), ranks=Ranks(1, 2))
    assert trainer.parts == [slice(4, 6), slice(6, 8)]
    made = [trainer._make_batch((0, index)) for index in (0, 1)]
    assert rows == [(8, slice(4, 6)), (8, slice(6, 8))]
    alone = Trainer(fakes.config(tmp_path, batch=8), fakes.FakeBase(), fakes.pairs())._make_batch((0, 0))
    assert torch.equal(torch.cat([part.targets for part in made]), alone.targets[4:])
    with pytest.raises(ValueError, match="accumulate = 3 parts cannot share the 8 rows of a rank evenly"):
        Trainer(fakes.config(tmp_path, batch=8, accumulate=3), fakes.FakeBase(), fakes.pairs())


# --- ahead


def test_the_next_batch_is_made_while_the_device_works_on_this_one(tmp_path):
    """The step does not go on before the next batch is begun: without the thread it would never be."""
    begun = [threading.Event() for _ in range(5)]

    class Source:
        phrases = fakes.PHRASES

        def __init__(self):
            self.own, self.made = fakes.pairs(), 0
            self.views, self.pictures = self.own.views, self.own.pictures

        def batch(self, kinds, generator, rows):
            assert threading.current_thread() is not threading.main_thread()
            begun[self.made].set()
            self.made += 1
            return self.own.batch(kinds, generator, rows)

    class Base(fakes.FakeBase):
        steps = 0

        def to_latents(self, pictures):
            self.steps += 1
            assert self.steps == 4 or begun[self.steps].wait(60), "the device worked alone"
            return super().to_latents(pictures)

    source = Source()
    trainer = Trainer(fakes.config(tmp_path / "a", steps=4), Base(), source)
    trainer.run()
    assert source.made == 4, "and none after the last step"
    plain = Trainer(fakes.config(tmp_path / "b", steps=4), fakes.FakeBase(), fakes.pairs())
    plain.run()
    for key, value in plain.network.state_dict().items():
        assert torch.equal(value, trainer.network.state_dict()[key])


def test_a_batch_comes_once_whatever_is_asked_for_and_its_error_with_it():
    made = []

    def make(key):
        made.append(key)
        if key == 2:
            raise ValueError("cat.png")
        return batch_of(float(key))

    batches = Ahead(make, CPU)
    assert batches.get(0, 1).targets.item() == 0 and batches.get(1, 2).targets.item() == 1
    with pytest.raises(ValueError, match="cat.png"):
        batches.get(2, 3)
    assert batches.get(7, None).targets.item() == 7 and made == [0, 1, 2, 7], "another one than was made ahead"
    assert batches.get(1, 8).targets.item() == 1 and batches.get(8, None).targets.item() == 8
    assert made == [0, 1, 2, 7, 1, 8]


def test_copies_to_a_gpu_are_pinned_do_not_wait_and_run_beside_the_step(monkeypatch):
    said, threads = [], set()

    class Stream:
        def record_event(self):
            said.append("event")
            return "copied"

        def wait_event(self, event):
            said.append(f"wait {event}")

    def to(tensor, device, non_blocking=False):
        threads.add(threading.current_thread())
        said.append(f"to {device} {non_blocking} {tensor.pinned}")
        return tensor

    def pinned(tensor):
        tensor.pinned = True
        return tensor

    @contextlib.contextmanager
    def stream(which):
        said.append("beside")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, which: said.append("kept"))
    ahead.Ahead(batch_of, torch.device("cuda:0")).get(1.0, None)
    assert said == ["beside", *["to cuda:0 True True"] * 3, "event", "wait copied", *["kept"] * 3]
    assert threading.main_thread() not in threads


def test_what_is_copied_are_targets_and_references():
    batch = batch_of(1.0)
    doubled = mapped(batch, lambda tensor: 2 * tensor)
    assert doubled.targets.item() == 2 and doubled.references["cls"].eq(2).all() and doubled.captions is batch.captions


def test_the_line_on_the_screen_tells_speed_waiting_loss_and_rate():
    from flexip_core.training.loop import Step

    steps = [Step(n, 0.5, {}, 1e-4, 0.25, 0.05) for n in range(4)]
    assert words(steps, 8, CPU) == "0.25 s/step, 32.0 samples/s, data 20%, loss 0.5000, lr 0.0001"
