"""Draws the pictures of kernels.md: `python docs/pictures.py` writes docs/pictures/*.png."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).resolve().parent / "pictures"
# Okabe-Ito colours: distinguishable with any colour vision.
BLUE, ORANGE, GREEN, PINK, GREY = "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d9d9d9"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose axes are in hundredths of an inch."""
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width * 100)
    axes.set_ylim(height * 100, 0)
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x, y, width, height, text="", colour=GREY, size=9, **more) -> None:
    """A filled rectangle with text in its middle."""
    axes.add_patch(
        Rectangle((x, y), width, height, facecolor=colour, edgecolor="black", lw=0.8, **more)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes: Axes, start, end, text="", size=8, above=8, **more) -> None:
    """An arrow with text beside its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, lw=1.1, **more))
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - above)
    axes.text(*middle, text, ha="center", va="center", fontsize=size)


def say(axes: Axes, x, y, text, size=9, **more) -> None:
    """Text that begins at a point."""
    axes.text(x, y, text, fontsize=size, va=more.pop("va", "center"), **more)


def online_softmax() -> Figure:
    figure, axes = canvas(8.4, 3.9)
    say(axes, 20, 22, "Tiled online softmax: one tile of scores at a time", 11, weight="bold")
    box(axes, 90, 60, 280, 26, "key (M, D), value (M, V)", ORANGE)
    for column in range(4):
        for row in range(3):
            now = (column, row) == (2, 1)
            done = row == 0 or (row == 1 and column < 2)
            colour = PINK if now else "white"
            box(axes, 90 + 70 * column, 98 + 70 * row, 70, 70, "tile" if now else "", colour)
            if done:
                say(axes, 125 + 70 * column, 133 + 70 * row, "gone", 8, ha="center", color="grey")
    box(axes, 30, 98, 48, 210, "query\n(N, D)", BLUE)
    arrow(axes, (90, 325), (370, 325), "keys, from left to right", above=-12)
    box(axes, 470, 60, 340, 250, "", "white")
    say(axes, 485, 82, "kept for the rows of one tile, in float32", 9, weight="bold")
    say(axes, 485, 116, "top    largest score so far")
    say(axes, 485, 140, "total  sum of exp(score - top)")
    say(axes, 485, 164, "sum    sum of exp(score - top) * value")
    say(axes, 485, 200, "for each tile: new top; multiply total and sum", 8.5)
    say(axes, 485, 220, "by exp(old top - new top); add the tile", 8.5)
    say(axes, 485, 254, "at the end: out = sum / total")
    say(axes, 485, 282, "saved: top and total, 2 numbers for each row", 8.5)
    say(
        axes,
        30,
        366,
        "Memory: one tile and O(N). The order of sums is fixed: repeats are equal.",
        9,
    )
    return figure


def staged_backward() -> Figure:
    figure, axes = canvas(8.4, 4.3)
    say(
        axes,
        20,
        22,
        "Staged backward: weights of some rows, then three products",
        11,
        weight="bold",
    )
    box(axes, 30, 60, 150, 60, "rows of query\nand grad_out", BLUE)
    box(axes, 30, 150, 150, 60, "key, value", ORANGE)
    box(
        axes,
        270,
        60,
        200,
        150,
        "workspace\n\nP  weights\ndS  gradient of scores\n(rows, M), capped",
        PINK,
    )
    arrow(axes, (180, 90), (270, 110))
    arrow(axes, (180, 180), (270, 150))
    for place, (text, colour) in enumerate(
        (
            ("grad_value += P^T grad_out", GREEN),
            ("grad_key += dS^T query", GREEN),
            ("grad_query = dS key", GREEN),
        )
    ):
        box(axes, 580, 50 + 62 * place, 220, 46, text, colour)
        arrow(axes, (470, 135), (580, 73 + 62 * place))
    say(
        axes,
        30,
        250,
        "1  scores = query key^T; P from top and total; dS = scale P (grad_out value^T - delta)",
    )
    say(axes, 30, 276, "2  three products read the workspace; then the next rows overwrite it")
    say(
        axes,
        30,
        310,
        "delta: a row's sum of grad_out * out. Workspace: at most 40 MiB, or workspace_mib.",
        8.5,
    )
    say(
        axes,
        30,
        336,
        "Every sum has one owner and a fixed order: no atomics, bitwise repeatable.",
        8.5,
    )
    say(
        axes,
        30,
        370,
        "Serves every D and V: products tile over channels. On CPUs tiles stay in caches.",
        8.5,
    )
    say(axes, 30, 396, "workspace_mib=0 takes a forward in O(N) memory.", 8.5)
    return figure


def reassociated() -> Figure:
    figure, axes = canvas(8.4, 3.8)
    say(axes, 20, 22, "dot_product: the same product in another order", 11, weight="bold")
    say(axes, 30, 56, "(query key^T) value: N x M numbers in between")
    box(axes, 30, 76, 40, 130, "query\nN x D", BLUE, 7.5)
    box(axes, 84, 116, 90, 40, "key^T\nD x M", ORANGE, 7.5)
    say(axes, 182, 140, "=")
    box(axes, 200, 76, 90, 130, "N x M", PINK)
    box(axes, 306, 96, 40, 90, "value\nM x V", GREEN, 7.5)
    say(axes, 354, 140, "=")
    box(axes, 372, 76, 40, 130, "out", GREY)
    say(axes, 460, 56, "query (key^T value): D x V numbers in between")
    box(axes, 460, 116, 90, 40, "key^T\nD x M", ORANGE, 7.5)
    box(axes, 560, 96, 40, 90, "value\nM x V", GREEN, 7.5)
    say(axes, 608, 140, "=")
    box(axes, 624, 120, 40, 40, "state\nD x V", PINK, 7)
    box(axes, 690, 76, 40, 130, "query\nN x D", BLUE, 7.5)
    say(axes, 736, 140, "state =")
    box(axes, 784, 76, 40, 130, "out", GREY)
    say(axes, 30, 246, "2NM(D + V) operations, B*N*M numbers")
    say(axes, 460, 246, "2(N + M)DV operations, B*D*V numbers")
    say(
        axes,
        30,
        286,
        "Which is cheaper depends on N, M, D and V: order.py counts operations.",
        9,
    )
    say(
        axes,
        30,
        312,
        "The state is summed in float32; the backward gets it where it is small.",
        9,
    )
    say(axes, 30, 338, "Softmax and relu act on single scores: there is no such order for them.", 9)
    return figure


def staircase() -> Figure:
    figure, axes = canvas(8.4, 4.1)
    say(axes, 20, 22, "concat: a query sees the keys whose threshold it exceeds", 11, weight="bold")
    heights = [14, 26, 44, 60, 78, 94, 110, 124]
    for place, height in enumerate(heights):
        box(axes, 50 + 40 * place, 210 - height, 40, height, "", ORANGE if place < 5 else GREY)
        say(axes, 70 + 40 * place, 222, f"t{place + 1}", 8, ha="center")
    axes.plot([40, 385], [210 - 86, 210 - 86], color="black", ls="--", lw=1)
    say(axes, 390, 124, "a", 9)
    say(axes, 50, 246, "orange: seen, k = 5 keys", 8.5)
    say(axes, 50, 264, "thresholds t_j = -key_score_j, in order", 8.5)
    box(axes, 450, 60, 370, 190, "", "white")
    say(axes, 465, 84, "two tables, a row for each key; v in order", 9, weight="bold")
    say(axes, 465, 116, "G_k = v_1 + ... + v_k")
    say(axes, 465, 140, "T_k = sum over j < k of (t_(j+1) - t_j) G_j")
    say(axes, 465, 176, "a query: find k, read two rows", 9)
    say(axes, 465, 206, "out = [(a - t_k) G_k + T_k] / M", 10, weight="bold")
    say(
        axes,
        30,
        300,
        "Cost: a sort, a search for each query, (N + M)(V + log). No pair is visited.",
    )
    say(
        axes,
        30,
        326,
        "Memory: O((N + M) V). Every factor is a difference of neighbours and none is",
    )
    say(axes, 30, 348, "negative: nothing large cancels, however far the scores lie from zero.")
    say(axes, 30, 380, "Gradients of keys climb the same stairs from the largest threshold down.")
    return figure


def region() -> Figure:
    figure, axes = canvas(8.4, 3.7)
    say(
        axes,
        20,
        22,
        "Region: a depthwise convolution, one small kernel for each channel",
        11,
        weight="bold",
    )
    for channel, colour in enumerate((BLUE, ORANGE, GREEN)):
        x, y = 60 + 22 * channel, 60 + 22 * channel
        box(axes, x, y, 150, 110, "", colour)
    for line in range(1, 6):
        axes.plot([104 + 25 * line, 104 + 25 * line], [104, 214], color="white", lw=0.6)
        axes.plot([104, 254], [104 + 18 * line, 104 + 18 * line], color="white", lw=0.6)
    axes.add_patch(Rectangle((129, 122), 75, 54, fill=False, edgecolor="black", lw=2))
    say(axes, 60, 236, "features (B, C, T, H, W), channel by channel", 8.5)
    arrow(axes, (280, 150), (370, 150), "kt x kh x kw", above=12)
    box(axes, 380, 110, 80, 80, "one value\nof the same\nchannel", GREEN, 8)
    box(axes, 500, 60, 310, 180, "", "white")
    say(axes, 515, 84, "operations for each value", 9, weight="bold")
    say(axes, 515, 114, "depthwise    2 kt kh kw")
    say(axes, 515, 138, "published    32 * 2 kt kh kw, where a mask")
    say(axes, 515, 158, "             zeroes 31 of 32 products")
    say(axes, 515, 196, "3 x 7 x 7: 294 against 9408")
    say(
        axes,
        30,
        278,
        "Neighbours share most of what they read: rows of the input are kept close.",
        9,
    )
    say(
        axes,
        30,
        304,
        "Gradient of the input: the same, mirrored. Gradient of the weight: a sum over",
        9,
    )
    say(
        axes,
        30,
        326,
        "positions of shifted products, in pieces that are added in a fixed order.",
        9,
    )
    return figure


def block() -> Figure:
    figure, axes = canvas(8.8, 4.4)
    say(axes, 20, 22, "The block: few passes over the features", 11, weight="bold")
    box(axes, 30, 130, 90, 70, "x\n(B,C,T,H,W)\nany layout", BLUE, 8)
    box(axes, 190, 60, 170, 46, "theta: one product\nrows (B, N, D)", ORANGE, 8)
    box(
        axes,
        190,
        140,
        170,
        66,
        "phi | g: one product,\nmax pooling, 2 bits for\neach maximum; (B, M, D)",
        ORANGE,
        8,
    )
    box(axes, 420, 100, 130, 66, "attention\nno N x M matrix", PINK, 8.5)
    box(
        axes,
        610,
        100,
        240,
        66,
        "out product with the norm (eval)\nor its statistics (train),\nand the residual",
        GREEN,
        8,
    )
    arrow(axes, (120, 150), (190, 84))
    arrow(axes, (120, 170), (190, 172))
    arrow(axes, (360, 84), (420, 122))
    arrow(axes, (360, 172), (420, 146))
    arrow(axes, (550, 133), (610, 133))
    axes.plot([75, 75, 730], [200, 240, 240], color="black", lw=1.1)
    arrow(axes, (730, 240), (730, 168))
    say(
        axes, 400, 228, "residual: x is read once more, in the pass that writes z", 8.5, ha="center"
    )
    say(
        axes,
        30,
        280,
        "Layer by layer, every arrow is a tensor that is written, permuted and kept.",
        9,
    )
    say(
        axes,
        30,
        306,
        "Here projections write the rows that attention reads, from either layout.",
        9,
    )
    say(
        axes,
        30,
        332,
        "block.recompute = True keeps less for the backward, and computes it again.",
        9,
    )
    say(
        axes,
        30,
        358,
        "dot_product, evaluation: the output projection is multiplied into the state.",
        9,
    )
    say(
        axes,
        30,
        392,
        "A layer with hooks, or a replaced one, runs by itself: block.explain(x).",
        9,
    )
    return figure


PICTURES = {
    "online_softmax": online_softmax,
    "staged_backward": staged_backward,
    "reassociated": reassociated,
    "staircase": staircase,
    "region": region,
    "block": block,
}


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        FigureCanvasAgg(draw()).print_png(FOLDER / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
