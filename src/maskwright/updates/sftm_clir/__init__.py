"""Room: SFTM-CLIR."""

from maskwright.updates.sftm_clir.compose import Modules as Modules
from maskwright.updates.sftm_clir.compose import compose as compose
from maskwright.updates.sftm_clir.method import SftmClir as SftmClir
from maskwright.updates.sftm_clir.ranking import adapter_entries as adapter_entries
from maskwright.updates.sftm_clir.ranking import mean_average_precision as mean_average_precision
from maskwright.updates.sftm_clir.ranking import rerank as rerank
