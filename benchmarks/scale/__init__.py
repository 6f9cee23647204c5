"""What a 70B pair would cost: a model calibrated on the measured runs, and a simulation of its workers."""
