from maskwright.inputs.salm.method import Salm as Salm
