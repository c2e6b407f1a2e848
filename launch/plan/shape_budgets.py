"""What a plan knows of a shape that is searched within a budget, or reached in rounds: the shapes, and what the stage will try."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...models.shape_search import ShapeSpace
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.settings_structured import StructuredSettings
    from .shapes import ModelShape


def shape_space(shape: "ModelShape", structured: "StructuredSettings") -> "ShapeSpace | None":
    """The shapes within a stage's budget; None if its shape is given."""
    from ...models.family_map import family_of
    from ...models.shape_search import ShapeSpace, parse_budget

    if structured.budget is None:
        return None
    budget = parse_budget(structured.budget)
    return ShapeSpace(shape.config, family_of(shape.config), shape.tensors, budget, structured.found_by.grid)


def search_notes(shape: "ModelShape", structured: "StructuredSettings") -> list[str]:
    """What the search for the shape of a budget will try, one sentence each; [] if the shape is given."""
    space = shape_space(shape, structured)
    if space is None:
        return []
    search, shapes = structured.found_by, space.shapes
    measured = min(search.measured, len(shapes))
    sizes = sorted(one.parameters for one in shapes)
    notes = [
        f"search: {len(shapes):,} aligned shapes within {space.budget.words()} ({sizes[0] / 1e6:,.2f}M to {sizes[-1] / 1e6:,.2f}M "
        f"parameters, such as {space.most_even().words(space.before)}); "
        f"the KL of {measured:,} as cut is measured on {search.windows:,} windows"
    ]
    if rounds := [(min(number, measured), tokens) for number, tokens in search.rounds()]:
        each = ", then ".join(f"{number:,} shapes on {tokens:,} tokens each" for number, tokens in rounds)
        notes.append(f"search: distils {each}: {sum(number * tokens for number, tokens in rounds):,} tokens in all")
    return notes


def round_notes(shape: "ModelShape", settings: "PruneSettings") -> list[str]:
    """The shapes of each round of pruning and distillation, in one sentence; [] without rounds."""
    from ...models.family_map import family_of
    from ...models.shape_rounds import rounds_to
    from ...models.sizes import sizes_of

    structured = settings.structured
    if structured is None or structured.rounds is None:
        return []
    family = family_of(shape.config)
    before = sizes_of(shape.config, family)
    rounds = rounds_to(shape.config, family, shape.tensors, structured.kept, structured.rounds)
    each = "; ".join(f"{one.words(before)} ({one.share:.0%} of the decoder layers' parameters)" for one in rounds)
    return [f"cuts in {len(rounds)} rounds and distils after each: {each}"]
