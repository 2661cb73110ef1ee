"""`gptfl experiment`: a matrix of federations, each a real run in memory, and what they come to side by side.

plan       which cells there are, and the federation file of each
data       the splits, written for silos to read
work       runs them on the cores of this machine, as `worker` processes
"""
