from __future__ import annotations

import random

import pytest

from router.waiting_room import Place, WaitingRoom

CLASSES = ("high", "normal", "low")


def make_room(
    num_places: int = 100, *, reserved_fraction: float = 0.25, client_share: float = 1e9
) -> WaitingRoom:
    return WaitingRoom(
        num_places, CLASSES, reserved_fraction=reserved_fraction, client_share=client_share
    )


def fill(room: WaitingRoom, class_name: str, client: str | None = None) -> int:
    """Enter one by one while there is a place; return how many did."""
    count = 0
    while room.obstacle(class_name, client, 1) is None:
        room.enter(client, 1)
        count += 1
    return count


def test_each_class_leaves_places_for_those_worth_more() -> None:
    """Of 100 places, low may have floor(100 * 0.75^2) = 56, normal 75, high all."""
    room = make_room()

    assert fill(room, "low") == 56
    assert fill(room, "normal") == 75 - 56
    assert fill(room, "high") == 100 - 75
    assert [fill(room, name) for name in CLASSES] == [0, 0, 0]


def test_a_class_waits_for_places_whoever_has_taken_them() -> None:
    room = make_room()
    room.enter(None, 60)

    assert room.obstacle("low", None, 1) is not None
    assert room.obstacle("normal", None, 15) is None
    assert room.obstacle("normal", None, 16) is not None


def test_the_least_class_has_at_least_one_place() -> None:
    room = make_room(2, reserved_fraction=0.9)

    assert fill(room, "low") == 1


def test_an_obstacle_says_how_many_are_too_many() -> None:
    room = make_room()
    room.enter(None, 50)

    obstacle = room.obstacle("low", None, 10)

    assert obstacle is not None
    assert obstacle.code == "queue_full"
    assert obstacle.num_too_many == 4
    assert "50 sequences wait" in obstacle.message
    assert "'low'" in obstacle.message
    assert "56" in obstacle.message


def test_an_empty_room_takes_a_request_that_is_larger_than_it() -> None:
    room = make_room(2)

    assert room.obstacle("low", None, 5) is None
    room.enter(None, 5)
    assert room.obstacle("high", None, 1) is not None


def test_a_place_is_free_again_once() -> None:
    room = make_room(4)
    first, second = room.enter("a", 2)

    first.leave()
    first.leave()

    assert room.num_waiting == 1
    second.leave()
    assert room.num_waiting == 0


def test_one_client_alone_may_have_its_share() -> None:
    """With share 2, q < 2 * (90 - q) holds up to q = 60: two thirds."""
    room = make_room(90, client_share=2.0)

    assert fill(room, "high", "a") == 60
    obstacle = room.obstacle("high", "a", 1)
    assert obstacle is not None
    assert obstacle.code == "client_share_full"
    assert "client 'a' has 60" in obstacle.message


def test_clients_that_all_want_more_have_equal_parts_and_leave_one_for_others() -> None:
    """Three of them: each has 2 of 7 parts of 700 places, and 100 are left for a fourth."""
    room = make_room(700, client_share=2.0)
    draw = random.Random(0)
    places: dict[str, list[Place]] = {"a": [], "b": [], "c": []}

    for _ in range(20_000):
        client = draw.choice("abc")
        if draw.random() < 0.3 and places[client]:
            places[client].pop().leave()
        elif room.obstacle("high", client, 1) is None:
            places[client] += room.enter(client, 1)

    assert [len(held) for held in places.values()] == pytest.approx([200] * 3, abs=8)
    assert fill(room, "high", "newcomer") > 50


@pytest.mark.parametrize("seed", range(5))
def test_the_top_class_always_finds_its_places(seed: int) -> None:
    """Whatever the others do, 25 of 100 places are only ever taken by the top class."""
    draw = random.Random(seed)
    room = make_room()
    held: list[Place] = []
    for _ in range(2000):
        num_sequences = draw.randint(1, 3)
        class_name = draw.choice(["normal", "low"])
        if room.obstacle(class_name, None, num_sequences) is None:
            held += room.enter(None, num_sequences)
        elif draw.random() < 0.2:
            held.pop(draw.randrange(len(held))).leave()

        assert room.num_waiting <= 75
        assert room.obstacle("high", None, 25) is None
