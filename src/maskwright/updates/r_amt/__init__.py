"""Room: R-AMT, regularised mask tuning."""

from maskwright.updates.r_amt.dropout import agreement as agreement
from maskwright.updates.r_amt.dropout import distillation as distillation
from maskwright.updates.r_amt.dropout import gradient_dropout as gradient_dropout
from maskwright.updates.r_amt.method import RAmt as RAmt
