"""The words of the scenes, what they look like, and which of them never meet in training."""

from typing import Final, Literal

Rgb = tuple[int, int, int]
Size = Literal["small", "medium", "large"]
Split = Literal["train", "validation", "test"]

SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "crescent", "arrow")

# sRGB. Every two differ by at least 29 units of CIELAB, and by 20 however textures and gradients shade them.
COLOURS: Final[dict[str, Rgb]] = {
    "red": (214, 38, 38),
    "orange": (245, 135, 20),
    "yellow": (250, 218, 50),
    "green": (46, 158, 70),
    "cyan": (50, 205, 215),
    "blue": (34, 86, 214),
    "purple": (146, 48, 172),
    "pink": (248, 150, 190),
    "brown": (122, 74, 38),
    "white": (246, 246, 246),
    "black": (26, 26, 28),
    "gray": (145, 145, 147),
}

# The second tone of a texture. Dark colours are lightened, the others darkened, so that the colour keeps its name.
_LIGHTENED: Final = {"red": 0.24, "blue": 0.24, "purple": 0.24, "brown": 0.2, "black": 0.16}
_DARKENED: Final = {"white": 0.16}


def _shade(colour: str) -> Rgb:
    target, amount = (255, _LIGHTENED[colour]) if colour in _LIGHTENED else (0, _DARKENED.get(colour, 0.2))
    red, green, blue = (round(value + (target - value) * amount) for value in COLOURS[colour])
    return red, green, blue


SHADES: Final[dict[str, Rgb]] = {colour: _shade(colour) for colour in COLOURS}

# Radius of an object as a fraction of the picture's side. At 256 px the smallest still spans two latent cells.
SIZES: Final[dict[Size, tuple[float, float]]] = {
    "small": (0.11, 0.125),
    "medium": (0.142, 0.16),
    "large": (0.2, 0.24),
}

TEXTURES: Final = ("plain", "striped", "dotted", "checkered")
TEXTURE_PERIOD: Final = 0.1

BACKGROUNDS: Final = ("plain", "vertical", "horizontal")
# How much of its brightness a gradient loses from one side of the picture to the other.
GRADIENT: Final = 0.14

# Pairs that a reader cannot tell for certain where one lies on the other, in the shades of textures and gradients.
_TOO_NEAR: Final = (
    ("gray", "white"),
    ("gray", "black"),
    ("gray", "brown"),
    ("black", "brown"),
    ("blue", "purple"),
    ("orange", "brown"),
    ("red", "pink"),
    ("cyan", "gray"),
)

OBJECT_COLOURS: Final[dict[str, tuple[str, ...]]] = {
    background: tuple(
        colour
        for colour in COLOURS
        if colour != background and not any({colour, background} == {*pair} for pair in _TOO_NEAR)
    )
    for background in COLOURS
}
"""Colours an object may have on a background."""

# One pair for every shape, ten colours: each word is learned, the pair is seen in test scenes only.
HELD_OUT: Final[frozenset[tuple[str, str]]] = frozenset(
    {
        ("circle", "pink"),
        ("square", "cyan"),
        ("triangle", "orange"),
        ("star", "purple"),
        ("heart", "green"),
        ("diamond", "brown"),
        ("cross", "white"),
        ("ring", "yellow"),
        ("crescent", "gray"),
        ("arrow", "black"),
    }
)
"""(shape, colour) pairs that no training and no validation scene contains."""

POSITIONS: Final = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
RELATIONS: Final = ("left of", "right of", "above", "below")
OPPOSITE: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

NUMBERS: Final = ("zero", "one", "two", "three", "four")
MAX_OBJECTS: Final = 4

CHINESE: Final[dict[str, str]] = {
    **{"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "heart": "心形"},
    **{"diamond": "菱形", "cross": "十字", "ring": "圆环", "crescent": "月牙", "arrow": "箭头"},
    **{"red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "cyan": "青色", "blue": "蓝色"},
    **{"purple": "紫色", "pink": "粉色", "brown": "棕色", "white": "白色", "black": "黑色", "gray": "灰色"},
    **{"small": "小", "medium": "中等大小的", "large": "大"},
    **{"plain": "纯色", "striped": "条纹", "dotted": "圆点", "checkered": "格子"},
    **{"top left": "左上角", "top": "上方", "top right": "右上角", "left": "左侧", "centre": "中央", "right": "右侧"},
    **{"bottom left": "左下角", "bottom": "下方", "bottom right": "右下角"},
    **{"left of": "左边", "right of": "右边", "above": "上面", "below": "下面"},
    **{"one": "一", "two": "两", "three": "三", "four": "四"},
}

# No heart: there is one of every colour below.
EMOJI: Final[dict[str, str]] = {
    **{
        "triangle": "🔺",
        "star": "⭐",
        "heart": "❤️",
        "diamond": "♦️",
        "cross": "\N{HEAVY PLUS SIGN}",
        "ring": "⭕",
        "crescent": "🌙",
    },
    **{"arrow": "⬆️", "circle": "⏺️", "square": "⏹️"},
    **{"top left": "↖️", "top": "🔼", "top right": "↗️", "left": "◀️", "centre": "🎯", "right": "▶️"},
    **{"bottom left": "↙️", "bottom": "🔽", "bottom right": "↘️"},
    **{"one": "1️⃣", "two": "2️⃣", "three": "3️⃣", "four": "4️⃣"},
}

EMOJI_OBJECTS: Final[dict[tuple[str, str], str]] = {
    **{("circle", "red"): "🔴", ("circle", "orange"): "🟠", ("circle", "yellow"): "🟡", ("circle", "green"): "🟢"},
    **{("circle", "blue"): "🔵", ("circle", "purple"): "🟣", ("circle", "brown"): "🟤", ("circle", "black"): "⚫"},
    **{("circle", "white"): "⚪", ("square", "red"): "🟥", ("square", "orange"): "🟧", ("square", "yellow"): "🟨"},
    **{("square", "green"): "🟩", ("square", "blue"): "🟦", ("square", "purple"): "🟪", ("square", "brown"): "🟫"},
    **{("square", "black"): "⬛", ("square", "white"): "⬜", ("heart", "red"): "❤️", ("heart", "orange"): "🧡"},
    **{("heart", "yellow"): "💛", ("heart", "green"): "💚", ("heart", "blue"): "💙", ("heart", "purple"): "💜"},
    **{("heart", "brown"): "🤎", ("heart", "black"): "🖤", ("heart", "white"): "🤍", ("heart", "pink"): "🩷"},
    **{("heart", "cyan"): "🩵", ("heart", "gray"): "🩶"},
}
"""Emoji that are a shape in a colour by themselves."""
