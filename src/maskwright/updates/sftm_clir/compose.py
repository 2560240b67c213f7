"""Base + ranking + language: the modules of a language pair on a model, and off again to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from maskwright.core.errors import BadInput
from maskwright.updates import Added, Deltas, add

By = Literal["query", "document", "both"]


def compose(model: nn.Module, ranking: Deltas, *languages: Deltas, drop_heads: bool = False) -> Added:
    """model += ranking + languages, in one sum; the head is the ranking module's. `undo()` or a `with` takes all off.

    The values are made from the base each time, never by += and -= , so no number of switches drifts. Raises BadInput for
    a language module with a head of its own (drop_heads leaves it out), a ranking module without one, a language twice,
    modules of different tokenizers, a model other than their base, and modules that are on already.
    """
    if not ranking.full:
        raise BadInput("the ranking module has no head of its own: name its parameters in `full` when it is trained")
    for language in languages:
        if language.full and not drop_heads:
            raise BadInput(f"a language module brings {min(language.full)}: only the ranking module's head may be used")
    keys = [language.key for language in languages]
    if len(set(keys)) < len(keys):
        raise BadInput("a language module is listed twice, and would count twice")
    told = {str(m.made_by["tokenizer"]) for m in (ranking, *languages) if "tokenizer" in m.made_by}
    if len(told) > 1:
        raise BadInput(f"the modules were made with different tokenizers: {', '.join(sorted(told))}")
    return add(model, ranking, *(language.without_full() for language in languages))


@dataclass(frozen=True, eq=False)
class Modules:
    """One base's ranking module and its language modules by name: `use` puts a language pair's on the model.

    Raises BadInput, where a module is used, for what `compose` refuses.
    """

    model: nn.Module
    ranking: Deltas
    languages: Mapping[str, Deltas]
    drop_heads: bool = False

    def use(self, query: str, document: str, by: By = "document") -> Added:
        """The model for queries in one language and documents in another, while the context lasts or until `undo()`.

        by: whose language module: the document's (dlang, the usual choice), the query's (qlang) or both; a pair in one
        language adds its module once. Raises BadInput naming a language without a module.
        """
        wanted = {"query": (query,), "document": (document,), "both": (query, document)}.get(by)
        if wanted is None:
            raise BadInput(f"by is 'query', 'document' or 'both', got {by!r}")
        for name in wanted:
            if name not in self.languages:
                raise BadInput(f"no module of language {name!r}; there are {', '.join(self.languages) or 'none'}")
        chosen = [self.languages[name] for name in dict.fromkeys(wanted)]
        return compose(self.model, self.ranking, *chosen, drop_heads=self.drop_heads)
