"""Room: DMA."""

from maskwright.attention.dma.gate import Gate as Gate
from maskwright.attention.dma.gate import convert as convert
from maskwright.attention.dma.method import Dma as Dma
