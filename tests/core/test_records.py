"""The records that travel: what they refuse, how they stack, how they move."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch

from lit_matting.records import Detail, MattingBatch, MattingOutput, MattingSample


def sample(key: str = "set/shard/a", size: tuple[int, int] = (4, 6), **fields: Any) -> MattingSample:
    defaults = {
        "image": torch.rand(3, *size),
        "target": torch.rand(1, *size),
        "has_alpha": True,
        "prompt": f"the thing of {key}",
        "prompt_kind": "basic",
        "key": key,
    }
    return MattingSample(**{**defaults, **fields})


# --- one sample -------------------------------------------------------------------------------------------------------


def test_sample_refuses_a_target_of_another_size_and_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"`target of set/shard/a` must have shape \(1, H, W\) with H=4, W=6"):
        sample(target=torch.zeros(1, 4, 5))


def test_sample_refuses_a_grey_image() -> None:
    with pytest.raises(ValueError, match=r"`image of set/shard/a` must have shape \(3, H, W\)"):
        sample(image=torch.zeros(1, 4, 6))


def test_sample_refuses_a_target_in_bytes() -> None:
    with pytest.raises(ValueError, match=r"`target of set/shard/a` must lie in \[0, 1\]"):
        sample(target=torch.full((1, 4, 6), 255.0))


def test_records_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().prompt = "another"  # type: ignore[misc]


# --- stacking ---------------------------------------------------------------------------------------------------------


def test_stack_keeps_every_field_in_order() -> None:
    one, two = sample("s/0/a"), sample("s/0/b", has_alpha=False, instance=2, category="dog", prompt_kind="colour")
    batch = MattingBatch.stack([one, two], dataset="refmatte", iteration=7)
    assert len(batch) == 2
    assert torch.equal(batch.image[1], two.image)
    assert torch.equal(batch.target[0], one.target)
    assert batch.has_alpha.tolist() == [True, False]
    assert batch.has_alpha.dtype == torch.bool
    assert batch.instance.tolist() == [0, 2]
    assert batch.prompts == (one.prompt, two.prompt)
    assert batch.prompt_kinds == ("basic", "colour")
    assert batch.keys == ("s/0/a", "s/0/b")
    assert batch.categories == ("", "dog")
    assert (batch.dataset, batch.iteration, batch.phrases_per_image) == ("refmatte", 7, 1)
    assert batch.foreground is batch.detail is batch.instances is None


def test_stack_joins_what_all_samples_have_and_drops_what_only_some_have() -> None:
    def detail() -> Detail:
        return Detail(torch.rand(3, 2, 2), torch.rand(1, 2, 2), torch.tensor([0.0, 0.25, 0.5, 0.5]))

    rich = [
        sample(key, foreground=torch.rand(3, 4, 6), detail=detail(), instances=torch.rand(count, 4, 6))
        for key, count in (("a", 2), ("b", 3))
    ]
    batch = MattingBatch.stack(rich)
    assert batch.foreground.shape == (2, 3, 4, 6)
    assert batch.detail.image.shape == (2, 3, 2, 2)
    assert batch.detail.box.tolist() == [[0.0, 0.25, 0.5, 0.5]] * 2
    assert [tuple(item.shape) for item in batch.instances] == [(2, 4, 6), (3, 4, 6)]
    mixed = MattingBatch.stack([rich[0], sample("c")])
    assert mixed.foreground is mixed.detail is mixed.instances is None


def test_stack_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least one sample, got an empty list"):
        MattingBatch.stack([])


def test_stack_of_two_sizes_names_both_samples_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"s/0/a is \(3, 4, 6\) but s/0/c is \(3, 8, 6\); set an image_size"):
        MattingBatch.stack([sample("s/0/a"), sample("s/0/b"), sample("s/0/c", size=(8, 6))])


# --- moving -----------------------------------------------------------------------------------------------------------


def full_batch() -> MattingBatch:
    detail = Detail(torch.rand(3, 2, 2), torch.rand(1, 2, 2), torch.rand(4))
    return MattingBatch.stack([sample("a", detail=detail, instances=torch.rand(2, 4, 6))], dataset="x", iteration=3)


def test_moving_reaches_every_tensor_however_nested_and_leaves_the_rest() -> None:
    moved = full_batch().to("meta")
    assert all(
        item.device.type == "meta"
        for item in (moved.image, moved.has_alpha, moved.instances[0], moved.detail.image, moved.detail.box)
    )
    assert (moved.prompts, moved.dataset, moved.iteration) == (full_batch().prompts, "x", 3)


def test_detached_output_has_no_graph_in_any_field() -> None:
    leaf = torch.rand(1, 1, 2, 2, requires_grad=True)
    output = MattingOutput(
        leaf * 2, leaf, leaf * 3, None, leaf, (leaf * 1,), (leaf > 0,), attention={"layer": leaf * 4}
    )
    detached = output.detach()
    fields = (detached.alpha, detached.trimap, detached.alphas[0], detached.attention["layer"])
    assert not any(item.requires_grad for item in fields)
    assert detached.coarse_trimap is None
    assert output.alpha.requires_grad  # the original is as it was


def test_lightning_moves_a_batch_by_its_own_method() -> None:
    from lightning.fabric.utilities import move_data_to_device

    moved = move_data_to_device(full_batch(), torch.device("meta"))
    assert isinstance(moved, MattingBatch)
    assert moved.image.device.type == moved.detail.target.device.type == "meta"


def test_batch_survives_the_way_from_a_worker() -> None:
    batch = full_batch()
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.image, batch.image)
    assert torch.equal(again.detail.box, batch.detail.box)
    assert again.prompts == batch.prompts
