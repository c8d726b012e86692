"""What a caption says of a scene, before it is put in words."""

from typing import NamedTuple

from sana_export.scenes.scene import Group, Scene, arrangement_of, groups_of


class Named(NamedTuple):
    """Objects that one noun phrase names. What is None is not said."""

    number: int
    size: str | None
    texture: str | None
    colour: str | None
    shape: str | None


class Content(NamedTuple):
    """`arrangement`: the position of a single object, or the relation of the first of two to the second.

    `gradient`: the kind of the background where it is not plain and is said.
    """

    named: tuple[Named, ...]
    arrangement: str | None
    background: str | None
    gradient: str | None


class Mention(NamedTuple):
    """What is said. A plain texture and a medium size are worth no word unless `trivial`."""

    size: bool = True
    texture: bool = True
    colour: bool = True
    shape: bool = True
    arrangement: bool = True
    background: bool = True
    gradient: bool = False
    trivial: bool = False


class Facts(NamedTuple):
    """What a scene can be asked for, worked out once for all its captions."""

    groups: tuple[Group, ...]
    arrangement: str | None
    background: str
    gradient: str | None


def facts_of(scene: Scene) -> Facts:
    """The scene's facts."""
    kind = scene.background_kind
    return Facts(groups_of(scene), arrangement_of(scene), scene.background_colour, None if kind == "plain" else kind)


def content_of(facts: Facts, mention: Mention) -> Content:
    """Groups that read the same become one, and then have no relation to tell."""
    size, texture, colour, shape, arrangement, background, gradient, trivial = mention
    counts: dict[tuple[str | None, str | None, str | None, str | None], int] = {}
    for group in facts.groups:
        said = (
            group.size if size and (trivial or group.size != "medium") else None,
            group.texture if texture and (trivial or group.texture != "plain") else None,
            group.colour if colour else None,
            group.shape if shape else None,
        )
        counts[said] = counts.get(said, 0) + group.count
    return Content(
        tuple(Named(count, *said) for said, count in counts.items()),
        facts.arrangement if arrangement and len(counts) == len(facts.groups) else None,
        facts.background if background else None,
        facts.gradient if gradient else None,
    )
