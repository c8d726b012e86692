"""Programs call pieces in order, with the rows and values they name, and keep nothing longer than needed."""

import pytest

from sana_runtime.inductor_program import Call, run_calls


def test_calls_run_in_order_and_keep_what_is_asked_for() -> None:
    pieces = {"double": lambda x: (2 * x,), "add": lambda x, y: (x + y, x - y)}
    calls = (Call("double", ("a",), ("b",)), Call("add", ("b", "a"), ("sum", "difference")))
    values = {"a": 5}
    run_calls(calls, pieces, values, frozenset({"difference"}))
    assert values == {"a": 5, "difference": 5}


def test_a_row_of_a_value_is_an_input() -> None:
    pieces = {"make": lambda: ([10, 20, 30],), "same": lambda x: (x,)}
    calls = (
        Call("make", (), ("table",)),
        Call("same", ("table[2]",), ("row",)),
        Call("same", ("given[1]",), ("other",)),
    )
    values = {"given": [7, 8]}
    run_calls(calls, pieces, values, frozenset({"row", "other"}))
    assert (values["row"], values["other"]) == (30, 8)
    assert "table" not in values


def test_a_value_is_dropped_after_its_last_use() -> None:
    class Tracked:
        alive = 0

        def __init__(self) -> None:
            Tracked.alive += 1

        def __del__(self) -> None:
            Tracked.alive -= 1

    seen: list[int] = []

    def make(*_: object) -> tuple[Tracked]:
        seen.append(Tracked.alive)
        return (Tracked(),)

    calls = tuple(Call("make", (f"x{i}",), (f"x{i + 1}",)) for i in range(4))
    run_calls(calls, {"make": make}, {"x0": 0}, frozenset({"x4"}))
    # The input of a call lives while it runs, what came before does not.
    assert seen == [0, 1, 1, 1]


def test_a_piece_must_return_what_its_call_names() -> None:
    with pytest.raises(ValueError, match="zip"):
        run_calls((Call("one", (), ("a", "b")),), {"one": lambda: (1,)}, {}, frozenset())
