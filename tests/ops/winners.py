"""Windows of 2 x 2 numbers, and which of them wins: the first of equals, a later NaN."""

_NAN, _LOW = float("nan"), -float("inf")
WINNERS = [
    ([1, 2, 2, 0], 1),
    ([3, 3, 3, 3], 0),
    ([_LOW] * 4, 0),
    ([-0.0, 0.0, 0.0, -0.0], 0),
    ([_NAN, 5, 1, 1], 0),
    ([1, 5, _NAN, 9], 2),
    ([_NAN, 5, _NAN, 9], 2),
    ([_NAN] * 4, 3),
    ([_LOW, _LOW, 1, _NAN], 3),
]
