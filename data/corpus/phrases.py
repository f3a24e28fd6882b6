"""Built-in parallel text: dates, durations, amounts and quantities in two languages.

Babel composes them from the Unicode Common Locale Data Repository (CLDR): names of months, units and currencies, plural
forms, word order, number separators. Both sides are thus what careful software would show, for any two of CLDR's
languages, and nothing needs to be downloaded.

    on dates       March 5, 2024               5. März 2024
                   Tuesday, March 5, 2024      Dienstag, 5. März 2024
                   3rd quarter 2019            3. Quartal 2019
    durations      3 days and 2 hours          3 Tage und 2 Stunden
                   in 3 weeks, 5 months ago    in 3 Wochen, vor 5 Monaten
    amounts        1,234.50 Swiss francs       1.234,50 Schweizer Franken
    quantities     3.5 kilometers per hour     3,5 Kilometer pro Stunde

and lists of two of these. The kind of a phrase and every number in it follow from its index alone. A hash of the source
text decides whether a phrase is held out, so that no source is in both splits.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from ..errors import DataError
from ..random import RandomStream
from .parallel import Pair

Split = Literal["train", "held-out"]
HELD_OUT = 16  # one in this many sources is held out
COUNT = {"train": 30_000, "held-out": 1000}
CURRENCIES = (
    "EUR",
    "USD",
    "GBP",
    "JPY",
    "CHF",
    "CAD",
    "AUD",
    "SEK",
    "NOK",
    "DKK",
    "PLN",
    "CZK",
    "INR",
    "CNY",
    "BRL",
    "MXN",
)
_TWO = 0.2  # fraction of phrases that are a list of two
_FIRST_DAY = datetime.date(1900, 1, 1)
_DAYS = 73_000
_PERIODS = ("year", "month", "week", "day", "hour", "minute", "second")

Draw = Iterator[float]
Say = Callable[[str], str]  # language -> text


def phrase_pairs(split: Split, languages: tuple[str, str] = ("en", "de"), count: int | None = None) -> list[Pair]:
    """Return distinct phrases of a split, always the same ones.

    Args:
        split: the split.
        languages: source and target, by CLDR's names.
        count: number of phrases; None for the default.

    Raises:
        DataError: CLDR does not have one of the languages.
    """
    wanted = COUNT[split] if count is None else count
    pairs: list[Pair] = []
    seen: set[str] = set()
    make = _Phrases(languages)
    for index in range(100 * wanted + 1000):
        if len(pairs) == wanted:
            break
        say = make.phrase(index)
        source = _typed(say(languages[0]))
        digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") % HELD_OUT == 0
        if held_out == (split == "held-out") and source not in seen:
            seen.add(source)
            pairs.append(Pair(source, _typed(say(languages[1])), len(pairs) + 1))
    return pairs


class _Phrases:
    def __init__(self, languages: tuple[str, str]):
        from babel import Locale, UnknownLocaleError

        self.locales: dict[str, Any] = {}
        for language in languages:
            try:
                self.locales[language] = Locale.parse(language)
            except (UnknownLocaleError, ValueError):
                raise DataError(
                    f"{language!r}: CLDR has no language of this name; use one such as en, de or fr."
                ) from None
        self.units = self._units(languages)
        self.kinds = (self.date, self.quarter, self.duration, self.relative, self.amount, self.quantity, self.quantity)

    def _units(self, languages: tuple[str, str]) -> list[str]:
        """Return the units whose name is unique in both languages, so that no name has two translations."""
        tables = [self.locales[language]._data["unit_patterns"] for language in languages]
        names: dict[str, list[str]] = {}
        for unit in sorted(set(tables[0]) & set(tables[1])):
            forms = [table[unit].get("long", {}) for table in tables]
            if all("other" in form for form in forms) and not unit.startswith("temperature-generic"):
                for name in set(map(str, forms[0].values())):
                    names.setdefault(name, []).append(unit)
        shared = {unit for units in names.values() if len(units) > 1 for unit in units}
        return sorted({unit for units in names.values() for unit in units} - shared)

    def phrase(self, index: int) -> Say:
        """Return phrase number `index`, as a function of the language."""
        draw = iter(RandomStream(index).uniforms(64).tolist())
        if next(draw) >= _TWO:
            return self._one(draw)
        parts = [self._one(draw), self._one(draw)]

        def say(language: str) -> str:
            from babel.lists import format_list

            return format_list([part(language) for part in parts], locale=self.locales[language])

        return say

    def _one(self, draw: Draw) -> Say:
        return _pick(self.kinds, draw)(draw)

    def date(self, draw: Draw) -> Say:
        """Return a day, in one of the language's date formats."""
        from babel.dates import format_date

        day = _FIRST_DAY + datetime.timedelta(int(next(draw) * _DAYS))
        form = _pick(("long", "full", "medium"), draw)
        return lambda language: format_date(day, form, locale=self.locales[language])

    def quarter(self, draw: Draw) -> Say:
        """Return a quarter or a month of a year."""
        from babel.dates import format_skeleton

        day = _FIRST_DAY + datetime.timedelta(int(next(draw) * _DAYS))
        form = _pick(("yQQQQ", "yMMMM", "MMMMd"), draw)
        return lambda language: format_skeleton(form, day, locale=self.locales[language])  # pyright: ignore

    def duration(self, draw: Draw) -> Say:
        """Return one to three periods of time, longest first."""
        from babel.lists import format_list
        from babel.units import format_unit

        count = 1 + int(next(draw) * 3)
        first = int(next(draw) * (len(_PERIODS) - count + 1))
        parts = [(f"duration-{name}", 1 + int(next(draw) ** 2 * 60)) for name in _PERIODS[first : first + count]]

        def say(language: str) -> str:
            locale = self.locales[language]
            return format_list([format_unit(number, unit, locale=locale) for unit, number in parts], locale=locale)

        return say

    def relative(self, draw: Draw) -> Say:
        """Return a time relative to now, past or future."""
        from babel.dates import format_timedelta

        seconds = dict(zip(_PERIODS, (31_536_000, 2_592_000, 604_800, 86_400, 3600, 60, 1), strict=True))
        period = _pick(_PERIODS, draw)
        number = (1 + int(next(draw) ** 2 * 30)) * (1 if next(draw) < 0.5 else -1)
        return lambda language: format_timedelta(
            number * seconds[period],
            granularity=period,  # pyright: ignore[reportArgumentType]
            threshold=1e9,
            add_direction=True,
            locale=self.locales[language],
        )

    def amount(self, draw: Draw) -> Say:
        """Return an amount of money, with the name of the currency."""
        from babel.numbers import format_currency

        number, currency = _number(draw), _pick(CURRENCIES, draw)
        return lambda language: format_currency(number, currency, locale=self.locales[language], format_type="name")

    def quantity(self, draw: Draw) -> Say:
        """Return a quantity with a unit of measure."""
        from babel.units import format_unit

        number, unit = _number(draw), _pick(self.units, draw)
        return lambda language: format_unit(number, unit, locale=self.locales[language])


def _typed(text: str) -> str:
    """Replace CLDR's non-breaking and narrow spaces by plain spaces."""
    return " ".join(text.split())


def _number(draw: Draw) -> float | int:
    """Draw a number from 1 to a million; small numbers are more frequent, some have decimals."""
    number = 10 ** (next(draw) * 6)
    return round(number, 1 + int(next(draw) * 2)) if next(draw) < 0.4 else int(number)


def _pick(of: Any, draw: Draw) -> Any:
    return of[int(next(draw) * len(of))]
