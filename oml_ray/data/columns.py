"""From a column's text to numbers, all rows at once.

Every value is first taken as text, so that CSV and Parquet, `3` and `3.0`, `True` and `1` are one thing. A parser
returns its values together with the mask of the rows that it could not read; an empty value is never such a row.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Ids = NDArray[np.int64]

# What pandas, and so OML, reads as missing (the default `na_values` of pandas.read_csv).
MISSING = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)
_INTEGER = r"^[+-]?[0-9]+(\.0*)?$"
_INT64_MAX = str(np.iinfo(np.int64).max)


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.LargeStringArray:
    """Take a column of any simple type as text, with null for what is empty (null, NaN or an empty text).

    Raises:
        pa.ArrowException: the type has no text (lists, structs), or a text is not UTF-8.
    """
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    text = pc.cast(column, pa.large_string())
    if isinstance(text, pa.ChunkedArray):
        text = text.combine_chunks()
    text.validate(full=True)  # the texts of a Parquet file are taken as they are
    return pc.if_else(pc.equal(text, ""), None, text)


def without_missing(text: pa.LargeStringArray) -> pa.LargeStringArray:
    """Replace the words for a missing value (`MISSING`) by null.

    Example:
        >>> without_missing(pa.array(["NULL", "3", " NaN", None], pa.large_string())).to_pylist()
        [None, '3', None, None]
    """
    missing = pc.is_in(pc.utf8_trim_whitespace(text), value_set=pa.array(MISSING, pa.large_string()))
    return pc.if_else(missing, None, text)


def as_mask(values: pa.Array) -> Mask:
    """Take an Arrow array of booleans as a mask; null counts as False."""
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=np.bool_)


def is_empty(text: pa.LargeStringArray) -> Mask:
    """Mark the rows that have no value."""
    return as_mask(pc.is_null(text))


def parse_integers(text: pa.LargeStringArray) -> tuple[Ids, Mask]:
    """Read integers that fit int64, also those written as floats (`3.0`).

    Returns:
        values: (rows,) int64, 0 where there is none; bad: (rows,) the rows that hold something else.

    Example:
        >>> parse_integers(pa.array(["3", "3.0", "3.5", None], pa.large_string()))
        (array([3, 3, 0, 0]), array([False, False,  True, False]))
    """
    text = pc.utf8_trim_whitespace(text)
    digits = pc.replace_substring_regex(text, r"^[+-]?0*([0-9]+?)(\.0*)?$", r"\1")
    length = pc.utf8_length(digits)
    fits = pc.or_(
        pc.less(length, len(_INT64_MAX)),
        pc.and_(pc.equal(length, len(_INT64_MAX)), pc.less_equal(digits, pa.scalar(_INT64_MAX, pa.large_string()))),
    )
    good = as_mask(pc.and_(pc.match_substring_regex(text, _INTEGER), fits))
    magnitudes = pc.cast(pc.if_else(pa.array(good), digits, "0"), pa.int64()).to_numpy()
    values = np.where(as_mask(pc.starts_with(text, "-")), -magnitudes, magnitudes)
    return values, ~good & ~is_empty(text)


def parse_flags(text: pa.LargeStringArray) -> tuple[Mask, Mask]:
    """Read booleans: True and False in any case, 1 and 0, 1.0 and 0.0.

    Returns:
        values: (rows,) False where there is none; bad: (rows,) the rows that hold something else.
    """
    text = pc.utf8_lower(pc.utf8_trim_whitespace(text))
    true, false = (
        as_mask(pc.is_in(text, value_set=pa.array(words, pa.large_string())))
        for words in (["true", "1", "1.0"], ["false", "0", "0.0"])
    )
    return true, ~true & ~false & ~is_empty(text)


def parse_codes(text: pa.LargeStringArray) -> tuple[Ids, list[str]]:
    """Number the distinct names, which may be integers, by first appearance.

    Returns:
        codes: (rows,) int64, -1 where there is none; names: the text of each code.

    Example:
        >>> parse_codes(pa.array(["7", "5.0", None, "7.0"], pa.large_string()))
        (array([ 0,  1, -1,  0]), ['7', '5'])
    """
    text = pc.utf8_trim_whitespace(text)
    if pc.all(pc.match_substring_regex(text, _INTEGER)).as_py():
        # a column of integers with an empty value becomes one of floats in pandas: 7 is written as 7.0
        text = pc.replace_substring_regex(text, r"\.0*$", "")
    return encode(text)


def encode(text: pa.LargeStringArray) -> tuple[Ids, list[str]]:
    """Number the distinct texts, exactly as they are, by first appearance; -1 for none."""
    encoded = pc.dictionary_encode(text)
    codes = pc.fill_null(pc.cast(encoded.indices, pa.int64()), -1).to_numpy()
    return codes, encoded.dictionary.to_pylist()


def split_paths(paths: pa.LargeStringArray) -> tuple[pa.LargeStringArray, pa.LargeStringArray]:
    """Part paths and URIs into directory and name; the options of a URI (`?key=value`) stay with its directory.

    Example:
        >>> [part.to_pylist() for part in split_paths(pa.array(["a/b.png", "s3://c/d.png?e=f"], pa.large_string()))]
        [['a/', 's3://c/?e=f'], ['b.png', 'd.png']]
    """
    uri = r"(?P<place>[A-Za-z][A-Za-z0-9+.\-]*://[^?]*/)(?P<key>[^?]*)(?P<options>(?:\?.*)?)"
    parts = pc.extract_regex(paths, rf"(?s)^(?:{uri}|(?P<directory>(?:.*/)?)(?P<name>[^/]*))$")
    place, key, options, directory, name = (pc.struct_field(parts, index) for index in range(5))
    join = pc.binary_join_element_wise
    nothing = pa.scalar("", pa.large_string())
    return join(place, options, directory, nothing), join(key, name, nothing)


def first_of_each(*keys: NDArray[np.integer]) -> Mask:
    """Mark the first row of every distinct combination of keys.

    Args:
        keys: arrays of shape (rows,).

    Returns:
        (rows,) False for the rows that repeat an earlier one.
    """
    order = np.lexsort(keys)  # stable: equal rows stay in the order of their ids
    first = np.ones(len(order), dtype=np.bool_)
    for_sorted = np.zeros(max(len(order) - 1, 0), dtype=np.bool_)
    for key in keys:
        for_sorted |= key[order][1:] != key[order][:-1]
    first[order[1:]] = for_sorted
    return first


def named_label(label: int, name: str | None) -> str:
    """Label as a text for people, with its name if it has one.

    Example:
        >>> named_label(3, "cat"), named_label(4, None)
        ('3 (cat)', '4')
    """
    return f"{label}" if name is None else f"{label} ({name})"


def name_rows(mask: Mask, *found: pa.LargeStringArray, limit: int = 5) -> str:
    """Say how many rows are marked, and what stands in the first of them.

    Example:
        >>> name_rows(np.array([True, False, True]), pa.array(["cat", "3", None], pa.large_string()))
        "2 rows: 0 ('cat'), 2 (empty)"
    """
    ids = np.flatnonzero(mask)
    rows = []
    for row in ids[:limit].tolist():
        values = [column[row].as_py() for column in found]
        texts = ", ".join("empty" if value is None else shown(value) for value in values)
        rows.append(f"{row} ({texts})" if texts else f"{row}")
    more = ", ..." if len(ids) > limit else ""
    return f"{len(ids):,} row{'s' if len(ids) != 1 else ''}: {', '.join(rows)}{more}"


def shown(text: str, limit: int = 120) -> str:
    """A cell as a part of a message: quoted, in one line, and cut where it is long."""
    return repr(text if len(text) <= limit else f"{text[: limit - 3]}...")
