"""Which layers of student and teacher meet."""

import pytest

from decoct.models.common.errors import UserError
from decoct.models.layer_pairs import layer_pairs, recorded_layers


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(3, 6, [1, 3, 5]), (4, 4, [0, 1, 2, 3]), (3, 4, [0, 2, 3]), (2, 5, [1, 4]), (6, 4, [0, 0, 1, 2, 2, 3]), (1, 7, [6])],
)
def test_even_pairs_end_with_the_last_layers(student: int, teacher: int, expected: list[int]) -> None:
    assert layer_pairs("even", student, teacher, None, "key") == list(enumerate(expected))


def test_last_kept_and_explicit_pairs() -> None:
    assert layer_pairs("last", 3, 6, None, "key") == [(2, 5)]
    assert layer_pairs("kept", 3, 6, [0, 2, 5], "key") == [(0, 0), (1, 2), (2, 5)]
    assert layer_pairs(((0, 3), (2, 1)), 3, 6, None, "key") == [(0, 3), (2, 1)]


@pytest.mark.parametrize("kept", [None, [0, 1], [0, 1, 6]])
def test_kept_layers_that_are_not_recorded_are_refused(kept: list[int] | None) -> None:
    with pytest.raises(UserError, match=r"hidden\.layers: kept, but .* teacher's 6 layers its 3 layers were made .* use even, or name"):
        layer_pairs("kept", 3, 6, kept, "hidden.layers")


@pytest.mark.parametrize("pair", [(3, 0), (0, 6)])
def test_layers_that_do_not_exist_are_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"the pair \[{pair[0]}, {pair[1]}\] does not exist: the student has 3 layers and the teacher 6"):
        layer_pairs((pair,), 3, 6, None, "key")


def test_what_a_folder_records_of_its_layers() -> None:
    assert recorded_layers({"kept": {"layers": [0, 2, 5]}, "parent_shape": {"layers": 6}}, 3, 6) == [0, 2, 5]
    assert recorded_layers({"kept": {"layers": [0, 2, 5]}, "parent_shape": {"layers": 8}}, 3, 6) is None, "cut from another model"
    assert recorded_layers({"kept": {"ffn": {}}}, 6, 6) == [0, 1, 2, 3, 4, 5], "no layer was cut"
    assert recorded_layers({}, 3, 6) is None
    assert recorded_layers({"kept": {"layers": "all"}}, 3, 6) is None


def test_layers_are_traced_through_stages_that_cut_again() -> None:
    root = {"shape": {"layers": 8}, "kept": {"layers": [0, 7], "ffn": {}}}
    pruned = {"root": root, "kept": {"layers": [0, 3]}, "parent_shape": {"layers": 4}}
    assert recorded_layers(pruned, 2, 8) == [0, 7]
    assert recorded_layers(pruned, 2, 4) is None, "not of the model in between"
    assert recorded_layers({"root": {"shape": {"layers": 8}, "kept": {"ffn": {}}}}, 8, 8) == list(range(8)), "its FFN alone was cut"
    assert recorded_layers({"root": "x"}, 3, 8) is None
