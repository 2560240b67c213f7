"""Room: SNELL and SNELLA."""

from maskwright.updates.snella.method import Snella as Snella
