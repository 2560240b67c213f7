from maskwright.inputs.mid.method import Mid as Mid
