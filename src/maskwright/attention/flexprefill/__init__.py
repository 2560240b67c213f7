"""Room: FlexPrefill."""

from maskwright.attention.flexprefill.method import FlexPrefill as FlexPrefill
