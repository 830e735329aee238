"""The SQL shapes over a child table and the parent that it refers to."""

from typing import Final

from . import wordings as w
from .shapes import Shape
from .slots import child_and_parent
from .wordings import Wordings

_CHILD_ROWS: Final = w.ROWS.rename(a="{x}", **{"as": "{xs}"}, item="{child}", items="{children}")
_CHILD_COUNTS: Final = w.COUNTS.rename(items="{children}")
_PARENT_GROUPS: Final = w.GROUPS.rename(cat="{parent} {cat}", cats="{parent} {cats}", items="{children}")
_JOIN: Final = "FROM {c} JOIN {t} ON {c}.{t} = {t}.id"

JOIN_SHAPES: Final = (
    Shape(
        "join_columns",
        child_and_parent,
        f"SELECT {{c}}.{{x}}, {{t}}.{{y}} {_JOIN}",
        Wordings(
            (
                "[Show|List|Give|Return] the {x} of each {child} and the {y} of its {parent}.",
                "For [each|every] {child}, [show|list|give] the {x} and the {y} of its {parent}.",
                "What are the {xs} of the {children} and the {ys} of their {parents}?",
                "[Show|Give|Tell] me the {x} of every {child} with the {y} of its {parent}.",
                "I [want|need] every {child}'s {x} and its {parent}'s {y}.",
                "Go through [all|the] {children} and [show|list] the {x} and the {parent}'s {y}.",
                "Can you [list|show me] the {x} of all {children} and the {y} of the {parent}?",
                "[Show|List] [all|the] {children} with their {x} and the {y} of their {parent}.",
            ),
            (
                "Look up the {x} of all our {children}, each along with the {y} of its {parent}.",
                "Could you get me the {x} for every {child} and then its {parent}'s {y}, please?",
            ),
        ),
    ),
    Shape(
        "join_filter",
        child_and_parent,
        f"SELECT {{c}}.{{x}} {_JOIN} WHERE {{t}}.{{cat}} = {{lit}}",
        _CHILD_ROWS.cross(w.OF_A_PARENT),
    ),
    Shape(
        "join_count",
        child_and_parent,
        f"SELECT COUNT(*) {_JOIN} WHERE {{t}}.{{cat}} = {{lit}}",
        _CHILD_COUNTS.cross(w.OF_A_PARENT),
    ),
    Shape(
        "join_group",
        child_and_parent,
        f"SELECT {{t}}.{{cat}}, COUNT(*) {_JOIN} GROUP BY {{t}}.{{cat}}",
        _PARENT_GROUPS.cross(
            Wordings(
                (
                    "the number of {children}",
                    "the count of {children}",
                    "the number of its {children}",
                    "the {child} count",
                ),
                ("how many {children} it has",),
            )
        ),
    ),
    Shape(
        "join_top",
        child_and_parent,
        f"SELECT {{t}}.name {_JOIN} ORDER BY {{c}}.{{x}} DESC LIMIT {{k}}",
        Wordings(
            (
                "[Show|List|Give|Return] the {parent} names of the {k} {children} <if>.",
                "What are the names of the {parents} of the {k} {children} <if>?",
                "For the {k} {children} <if>, [show|list|give] the name of the {parent}.",
                "I [want|need] the {parent} names of the {k} {children} <if>.",
                "Find the {k} {children} <if> and [show|list|return] the names of their {parents}.",
                "Can you [list|show me] the {parent} names of the {k} {children} <if>?",
                "Which {parent} names do the {k} {children} <if> have?",
                "[Show|Give|Tell] me the name of the {parent} of each of the {k} {children} <if>.",
            ),
            (
                "Look up the {parent} names of those {k} {children} <if>.",
                "Could you get me the name of the {parent} for each of the {k} {children} <if>?",
            ),
        ).cross(w.MOST.rename(num="{x}")),
    ),
    Shape(
        "without_children",
        child_and_parent,
        "SELECT name FROM {t} WHERE id NOT IN (SELECT {t} FROM {c})",
        Wordings(
            (
                "[Show|List|Give|Return] the names of [all|the] {parents} <if>.",
                "What are the names of the {parents} <if>?",
                "[Show|Give|Tell] me the name of [each|every] {parent} <if>.",
                "For [all|the] {parents} <if>, [show|list|give] the name.",
                "I [want|need] the names of {parents} <if>.",
                "Find [all|the] {parents} <if> and [show|list|return] their names.",
                "Can you [list|show me] the names of {parents} <if>?",
            ),
            (
                "Look up the names of those {parents} <if>.",
                "Could you get me the name for every {parent} <if>, please?",
            ),
        ).cross(
            Wordings(
                ("without {children}", "without any {children}", "with no {children}", "having no {children}"),
                ("lacking any {children}", "for which there is no {child}"),
            )
        ),
    ),
)
