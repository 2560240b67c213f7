"""DSnoT."""

from maskwright.weights.dsnot.method import Dsnot as Dsnot
