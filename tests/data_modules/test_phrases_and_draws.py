"""Which phrase is drawn, and which sample: pure functions, every sample once per epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_modules.draws import Draws
from data_modules.phrases import PhrasePolicy, TextRules, mirrored
from data_modules.schedule import InterleavedSchedule
from data_modules.shards import RawSample, ShardIndex
from data_modules.stream import StreamPlan
from lit_matting.checks import InputError


@pytest.fixture
def sample(pictures: Callable[..., Path]) -> RawSample:
    """Three instances; the last has no phrases."""

    def phrases(number: int, instance: int) -> list[tuple[str, str]]:
        named = [(f"thing {instance}", "basic"), (f"red {instance}", "colour"), (f"on the left {instance}", "position")]
        return named if instance < 2 else []

    return ShardIndex.load(pictures("p", 1, instances=3, phrases=phrases)).read(0)


def _many(
    policy: PhrasePolicy, sample: RawSample, iteration: int = 0, draws: int = 600
) -> Counter[tuple[int, str, str]]:
    chosen = [policy.choose(sample, iteration, np.random.default_rng(draw)) for draw in range(draws)]
    return Counter((choice.instance, choice.phrase.kind, choice.phrase.text) for each in chosen for choice in each)


def test_phrases_of_one_image_are_of_different_instances(sample: RawSample) -> None:
    policy = PhrasePolicy(phrases_per_image=2)
    for draw in range(50):
        chosen = policy.choose(sample, 0, np.random.default_rng(draw))
        assert sorted(choice.instance for choice in chosen) == [0, 1]


def test_too_few_instances_are_called_by_another_phrase(sample: RawSample) -> None:
    policy = PhrasePolicy(phrases_per_image=5)
    for draw in range(50):
        chosen = policy.choose(sample, 0, np.random.default_rng(draw))
        assert len({(choice.instance, choice.phrase.text) for choice in chosen}) == 5


def test_every_allowed_phrase_is_drawn_equally_often(sample: RawSample) -> None:
    counts = _many(PhrasePolicy(), sample)
    assert len(counts) == 6
    # 100 each expected; five standard deviations of a binomial are 46
    assert all(abs(count - 100) < 46 for count in counts.values())


def test_warm_up_draws_only_its_kinds_and_ends_with_its_iterations(sample: RawSample) -> None:
    policy = PhrasePolicy(warmup_iterations=10, warmup_kinds=["colour"])
    assert {kind for _, kind, _ in _many(policy, sample, 9, 50)} == {"colour"}
    assert {kind for _, kind, _ in _many(policy, sample, 10, 50)} == {"basic", "colour", "position"}


def test_kinds_can_be_left_out_and_weighted(sample: RawSample) -> None:
    assert {kind for _, kind, _ in _many(PhrasePolicy(kinds=["basic"]), sample, draws=50)} == {"basic"}
    weighted = _many(PhrasePolicy(kind_weights={"basic": 8, "position": 0}), sample, draws=900)
    kinds = Counter(
        {kind: sum(n for (_, k, _), n in weighted.items() if k == kind) for kind in ("basic", "colour", "position")}
    )
    assert kinds["position"] == 0
    # 8 to 1: 800 expected of 900, five standard deviations are 47
    assert abs(kinds["basic"] - 800) < 47


def test_templates_serve_instances_without_phrases_always_and_others_as_often_as_asked(sample: RawSample) -> None:
    policy = PhrasePolicy(templates=["the {category}"], template_probability=0.3)
    counts = _many(policy, sample, draws=1200)
    assert counts[2, "template", "the stripe"] == sum(n for (instance, _, _), n in counts.items() if instance == 2)
    others = sum(n for (instance, _, _), n in counts.items() if instance < 2)
    called = sum(n for (instance, kind, _), n in counts.items() if instance < 2 and kind == "template")
    # 0.3 of about 800, five standard deviations are 65
    assert abs(called - 0.3 * others) < 65


def test_image_without_allowed_phrases_gives_nothing(sample: RawSample) -> None:
    assert PhrasePolicy(kinds=["caption"]).choose(sample, 0, np.random.default_rng(0)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phrases_per_image": 0}, "must be 1 or more"),
        ({"template_probability": 0.3}, "`templates` is empty"),
        ({"template_probability": 2.0, "templates": ["x"]}, "must lie in"),
        ({"warmup_iterations": 5}, "`warmup_kinds` is empty"),
    ],
)
def test_impossible_policies_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PhrasePolicy(**settings)


@pytest.mark.parametrize(
    ("prompt", "side", "place", "colour"),
    [
        ("the man on the left", True, True, False),
        ("right-hand cup", True, True, False),
        ("the top shelf", False, True, False),
        ("the red car, LEFTMOST", True, True, True),
        ("a bright thing", False, False, False),
        ("she left", True, True, False),
        ("guy on r", True, True, False),
        ("the cup at 3 o'clock", True, True, False),
        ("a greyish owl", False, False, True),
        ("redwood tree", False, False, False),
    ],
)
def test_text_rules_go_by_whole_words(prompt: str, side: bool, place: bool, colour: bool) -> None:
    for rules in (TextRules.of([prompt]), TextRules.of(["a thing", prompt])):
        assert (rules.names_side, rules.names_place, rules.names_colour) == (side, place, colour)


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("the dog on the LEFT of the right-hand car", "the dog on the RIGHT of the left-hand car"),
        ("Leftmost guy, 2nd from rt", "Rightmost guy, 2nd from lft"),
        ("man on the right in red", "man on the left in red"),
        ("boy to the right behind the girl", "boy to the left behind the girl"),
        ("the upright bright cup", "the upright bright cup"),
        ("left-handed batter, lefthand side", "right-handed batter, righthand side"),
        ("the western saddle on the left", "the western saddle on the right"),
        ("the cup right next to the vase", None),
        ("what is left", None),
        ("left over pizza", None),
        ("the left-over pizza", None),
        ("the cup right side up", None),
        ("the L-shaped sofa on the left", None),
        ("toys r us bag", None),
        ("R2-D2", None),
        ("man in the West Ham shirt", None),
        ("guy on l", None),
        ("the one at 3 o'clock", None),
        ("clockwise from the left", None),
        ("rite one", None),
    ],
)
def test_sides_change_over_where_that_is_sure(prompt: str, other: str | None) -> None:
    assert mirrored(prompt) == other
    if other is not None:
        assert mirrored(other) == prompt


@pytest.mark.parametrize("counts", [[5, 5, 3], [1], [7, 1, 1, 1, 20, 2, 2], [3] * 40])
@pytest.mark.parametrize("mix", [1, 2, 16])
def test_every_epoch_holds_every_sample_once(counts: list[int], mix: int) -> None:
    draws = Draws(np.array(counts), 0, "a", mix)
    total = sum(counts)
    orders = []
    for epoch in range(3):
        found = [draws[epoch * total + position] for position in range(total)]
        assert {e for e, _ in found} == {epoch}
        orders.append([sample for _, sample in found])
        assert sorted(orders[-1]) == list(range(total))
    if total > 5:
        assert orders[0] != orders[1]


def test_a_place_is_found_without_the_ones_before_it() -> None:
    forwards = Draws(np.array([5, 7, 9, 2]), 1, "a", 2)
    expected = [forwards[j] for j in range(100)]
    for j in (99, 3, 57, 0, 22, 23):
        assert Draws(np.array([5, 7, 9, 2]), 1, "a", 2)[j] == expected[j]


def test_seed_and_data_set_change_the_order() -> None:
    orders = {tuple(Draws(np.array([50]), seed, name)[j][1] for j in range(50)) for seed in (0, 1) for name in "ab"}
    assert len(orders) == 4


def test_no_more_shards_are_open_at_a_time_than_are_mixed() -> None:
    draws = Draws(np.full(12, 10), 0, "a", mix_shards=3)
    shards = [draws[j][1] // 10 for j in range(120)]
    for group in range(4):
        mixed = set(shards[30 * group : 30 * (group + 1)])
        assert len(mixed) == 3
        # what is fetched ahead is what comes next
        key, ahead = draws.next_shards(30 * group + 29)
        assert key == (0, group)
        following = shards[30 * (group + 1) : 30 * (group + 2)] or [draws[120 + j][1] // 10 for j in range(30)]
        assert set(ahead) == set(following)


def test_substitutes_are_of_the_same_shard() -> None:
    draws = Draws(np.array([4, 6]), 0, "a")
    assert {draws.substitute(0, 1, attempt) for attempt in range(60)} == {0, 1, 2, 3}
    assert {draws.substitute(0, 4, attempt) for attempt in range(99)} == {4, 5, 6, 7, 8, 9}


@pytest.mark.parametrize("micro", [0, 1])
def test_plan_gives_every_draw_once_in_order_over_ranks_and_micro_batches(micro: int) -> None:
    schedule = InterleavedSchedule(["a", "b"], 4, ["c"])
    start = {"a": 100, "b": 7}
    plan = StreamPlan(schedule, {"a": 2, "b": 3, "c": 1}, 2, 3, 11, micro, start)
    found: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for consumed in range(60):
        place = plan.place(consumed)
        for rank in range(2):
            dataset, draws = plan.draws(place, rank)
            assert dataset == schedule.dataset(place[0])
            found[dataset] += draws
    assert place == (11 + (60 + micro - 1) // 3, (60 + micro - 1) % 3)
    for dataset, draws in found.items():
        assert draws == list(range(start.get(dataset, 0), start.get(dataset, 0) + len(draws)))
    # a plan that begins where this one stands goes on with the same draws
    after = StreamPlan(schedule, plan.images_per_batch, 2, 3, *plan.place(31), plan.moved(plan.place(31)))
    for consumed in range(20):
        assert after.draws(after.place(consumed), 1) == plan.draws(plan.place(31 + consumed), 1)
