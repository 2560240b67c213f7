from maskwright.inputs.dpo.method import Dpo as Dpo
