from maskwright.inputs.sparsepo.activations import activation_mask as activation_mask
from maskwright.inputs.sparsepo.masknet import TokenMaskNet as TokenMaskNet
from maskwright.inputs.sparsepo.method import SparsePo as SparsePo
