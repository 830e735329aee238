"""WikiSQL's logical-form accuracy."""

from collections.abc import Sequence

from lorakit.data import parse_sql
from lorakit.errors import UsageError
from lorakit.evaluate.text import check_references


def logical_form(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share, 0 to 1, of queries that mean a reference's logical form (Zhong et al. 2017, section 3.1).

    Aggregate, column and the set of conditions must be equal; the order of conditions and the case of values do not count.
    A prediction that is no SQL as the reader writes it is wrong. Raises UsageError for a reference that is none.
    """
    check_references(predictions, references)
    right = 0
    for number, (prediction, several) in enumerate(zip(predictions, references, strict=True), start=1):
        wanted = [parse_sql(text) for text in several]
        if None in wanted:
            raise UsageError(f"reference {number} is no SQL as the format wikisql writes it: {several[0]!r}.")
        right += parse_sql(prediction) in wanted
    return right / len(predictions)
