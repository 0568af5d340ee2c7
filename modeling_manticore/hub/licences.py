"""Licences of components by their id on the Hub, what they ask of a hybrid, and which licence the hybrid can have."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Licence:
    """
    What a licence asks of whoever shares a model that is made of weights under it. This is a table for a card, not
    legal advice.

    Args:
        name: for people.
        attribution: its notice must stay with the model.
        name_prefix: how the name of the model has to begin.
        non_commercial: no commercial use.
        share_alike: what is made of it has to be under the same licence.
        own_terms: the licence's own terms and use policy pass to whoever receives the model.
        no_derivatives: what is made of it may not be shared.
    """

    name: str
    attribution: bool = True
    name_prefix: str | None = None
    non_commercial: bool = False
    share_alike: bool = False
    own_terms: bool = False
    no_derivatives: bool = False

    @property
    def is_permissive(self) -> bool:
        """Whether a hybrid may be under another licence."""
        return not (self.non_commercial or self.share_alike or self.own_terms or self.no_derivatives)

    @property
    def obligations(self) -> list[str]:
        """What it asks, in words."""
        words = {
            "attribution: its notice stays with the model": self.attribution,
            f"the name begins with {self.name_prefix!r}": self.name_prefix is not None,
            "non-commercial use only": self.non_commercial,
            "share-alike: the same licence for what is made of it": self.share_alike,
            "its own terms and use policy pass on": self.own_terms,
            "what is made of it may not be shared": self.no_derivatives,
        }
        return [text for text, holds in words.items() if holds]


# In the order of what they ask: of several permissive licences a hybrid has the last one.
PERMISSIVE = {
    "cc0-1.0": Licence("CC0 1.0", attribution=False),
    "unlicense": Licence("The Unlicense", attribution=False),
    "wtfpl": Licence("WTFPL", attribution=False),
    "isc": Licence("ISC"),
    "mit": Licence("MIT"),
    "bsd": Licence("BSD"),
    "bsd-2-clause": Licence("BSD 2-clause"),
    "bsd-3-clause": Licence("BSD 3-clause"),
    "cdla-permissive-2.0": Licence("CDLA permissive 2.0"),
    "apache-2.0": Licence("Apache 2.0"),
    "cc-by-4.0": Licence("CC BY 4.0"),
}
LICENCES = PERMISSIVE | {
    "cc-by-sa-3.0": Licence("CC BY-SA 3.0", share_alike=True),
    "cc-by-sa-4.0": Licence("CC BY-SA 4.0", share_alike=True),
    "cc-by-nc-4.0": Licence("CC BY-NC 4.0", non_commercial=True),
    "cc-by-nc-sa-4.0": Licence("CC BY-NC-SA 4.0", non_commercial=True, share_alike=True),
    "cc-by-nd-4.0": Licence("CC BY-ND 4.0", no_derivatives=True),
    "cc-by-nc-nd-4.0": Licence("CC BY-NC-ND 4.0", non_commercial=True, no_derivatives=True),
    "mpl-2.0": Licence("MPL 2.0", share_alike=True),
    "gpl-3.0": Licence("GPL 3.0", share_alike=True),
    "agpl-3.0": Licence("AGPL 3.0", share_alike=True),
    "openrail": Licence("OpenRAIL", own_terms=True),
    "bigscience-openrail-m": Licence("BigScience OpenRAIL-M", own_terms=True),
    "bigscience-bloom-rail-1.0": Licence("BigScience BLOOM RAIL 1.0", own_terms=True),
    "bigcode-openrail-m": Licence("BigCode OpenRAIL-M", own_terms=True),
    "gemma": Licence("Gemma terms of use", own_terms=True),
    "llama2": Licence("Llama 2 community licence", own_terms=True),
    "llama3": Licence("Llama 3 community licence", own_terms=True, name_prefix="Llama 3"),
    "llama3.1": Licence("Llama 3.1 community licence", own_terms=True, name_prefix="Llama"),
    "llama3.2": Licence("Llama 3.2 community licence", own_terms=True, name_prefix="Llama"),
    "llama3.3": Licence("Llama 3.3 community licence", own_terms=True, name_prefix="Llama"),
    "llama4": Licence("Llama 4 community licence", own_terms=True, name_prefix="Llama"),
}
UNSAID = ("unknown", "other")  # ids of the Hub that say nothing about what is allowed


def licence_of_hybrid(
    components: Sequence[str | None],
    chosen: str | None = None,
    reason: str | None = None,
    repo_id: str | None = None,
) -> str:
    """
    The licence id that a hybrid has.

    Permissive ids give way to the one id that asks more (share-alike, non-commercial, terms of its own); among
    permissive ones the last in the table stands. Everything else has to be chosen, with a reason.

    Args:
        components: the licence id of every component used; None where it is not known.
        chosen, reason: `license` and `license_reason` of the recipe.
        repo_id: where the hybrid goes, for licences that want a name to begin in a certain way.

    Raises:
        ValueError: unknown or incompatible ids, or another choice than follows from them, without a reason; an
            unknown choice; a name that a component's licence does not allow.
    """
    for field, value in (("license", chosen), ("license_reason", reason)):
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"{field}: got {value!r}, allowed is a text that is not empty.")
    if chosen is not None and chosen not in LICENCES and chosen not in UNSAID:
        raise ValueError(f"license: got {chosen!r}, allowed are {', '.join([*LICENCES, *UNSAID])}.")
    found, problem = _combined(components)
    if reason is None:
        if problem is not None:
            raise ValueError(f"license: {problem}. Set `license` and `license_reason` in the recipe.")
        if chosen not in (None, found):
            raise ValueError(
                f"license: got {chosen!r}, but the components' licences give {found!r}. Another one needs a "
                "`license_reason` in the recipe."
            )
        for k, licence in enumerate(components):
            prefix = LICENCES[licence].name_prefix
            if prefix is not None and repo_id is not None and not _begins(repo_id.split("/")[-1], prefix):
                raise ValueError(
                    f"repo_id: got {repo_id!r}, but the licence {licence!r} of component {k} wants a name that begins "
                    f"with {prefix!r}. A name that is allowed all the same needs a `license_reason` in the recipe."
                )
    elif chosen is None and problem is not None:
        raise ValueError(f"license: {problem}; the recipe has a `license_reason` but no `license`.")
    return chosen or found


def _combined(components: Sequence[str | None]) -> tuple[str | None, str | None]:
    """The licence that follows from those of the components, or why none does."""
    for k, licence in enumerate(components):
        if licence not in LICENCES:
            return None, f"that of component {k} is {'unknown' if licence in (None, *UNSAID) else repr(licence)}"
        if LICENCES[licence].no_derivatives:
            return None, f"that of component {k}, {licence!r}, allows nothing made of it to be shared"
    asking = sorted({licence for licence in components if not LICENCES[licence].is_permissive})
    if len(asking) > 1:
        return None, f"the components' {' and '.join(map(repr, asking))} do not go together"
    return asking[0] if asking else max(components, key=list(PERMISSIVE).index), None


def _begins(name: str, prefix: str) -> bool:
    name, prefix = (re.sub(r"[\s_-]", "", text).lower() for text in (name, prefix))
    return name.startswith(prefix)


def licence_of_folder(folder: str | Path) -> str | None:
    """The `license` in the front matter of a local folder's README.md; None where it says none."""
    file = Path(folder) / "README.md"
    if not file.is_file():
        return None
    parts = re.split(r"^---\s*$", file.read_text(encoding="utf-8", errors="replace"), maxsplit=2, flags=re.MULTILINE)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:  # a card that cannot be read says nothing
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None
