"""Room: Sparse MeZO, and MeZO (mask="dense")."""

from maskwright.updates.sparse_mezo.log import Log as Log
from maskwright.updates.sparse_mezo.method import SparseMezo as SparseMezo
from maskwright.updates.sparse_mezo.run import Step as Step
