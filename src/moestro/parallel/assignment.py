"""The most valuable assignment of items to bins of equal size, exactly."""

from __future__ import annotations

import numpy as np


def balanced_assignment(value: np.ndarray) -> np.ndarray:
    """The bin of every item, as many items in each bin, such that the sum of values is largest.

    By shortest augmenting paths over the places of all bins (Jonker and Volgenant 1987), `items^3` at worst.

    Shapes: value `[items, bins]` -> `[items]` int.

    Raises:
        ValueError: items that bins cannot share evenly.
    """
    items, bins = value.shape
    if items % bins:
        raise ValueError(f"{items} items cannot be shared evenly by {bins} bins")
    cost = np.repeat(-np.asarray(value, dtype=np.float64), items // bins, axis=1)  # [items, places]
    of_place = np.full(items, -1)
    price_item, price_place = np.zeros(items), np.zeros(items)
    for item in range(items):
        _augment(cost, item, of_place, price_item, price_place)
    found = np.empty(items, dtype=np.int64)
    found[of_place] = np.arange(items) // (items // bins)
    return found


def _augment(
    cost: np.ndarray, item: int, of_place: np.ndarray, price_item: np.ndarray, price_place: np.ndarray
) -> None:
    """Give one more item a place by the cheapest chain of changes; prices stay such that no change would pay."""
    places = cost.shape[1]
    distance, before = np.full(places, np.inf), np.full(places, -1)
    done, current, reached, place = np.zeros(places, dtype=bool), item, 0.0, -1
    items = [item]
    while True:
        through = reached + cost[current] - price_item[current] - price_place
        shorter = ~done & (through < distance)
        distance[shorter], before[shorter] = through[shorter], current
        place = int(np.where(done, np.inf, distance).argmin())
        reached = float(distance[place])
        done[place] = True
        if of_place[place] < 0:
            break
        current = int(of_place[place])
        items.append(current)
    price_item[items[0]] += reached
    taken = done.copy()
    taken[place] = False
    price_item[of_place[taken]] += reached - distance[taken]
    price_place[taken] -= reached - distance[taken]
    while True:
        current = int(before[place])
        of_place[place], place = current, int(np.flatnonzero(of_place == current)[0]) if current != item else -1
        if current == item:
            return
