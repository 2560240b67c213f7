"""Room: sparse frontier."""

from maskwright.attention.sparse_frontier.counts import Size as Size
from maskwright.attention.sparse_frontier.counts import equal_density as equal_density
from maskwright.attention.sparse_frontier.counts import indexing as indexing
from maskwright.attention.sparse_frontier.counts import pareto as pareto
from maskwright.attention.sparse_frontier.counts import prefill_flops as prefill_flops
from maskwright.attention.sparse_frontier.counts import token_flops as token_flops
from maskwright.attention.sparse_frontier.guarantee import Guarantee as Guarantee
from maskwright.attention.sparse_frontier.guarantee import p_value as p_value
from maskwright.attention.sparse_frontier.method import SparseFrontier as SparseFrontier
from maskwright.attention.sparse_frontier.table import Point as Point
from maskwright.attention.sparse_frontier.table import Policy as Policy
from maskwright.attention.sparse_frontier.table import Table as Table
