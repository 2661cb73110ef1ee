#!/bin/bash
# The agent of a silo on a cluster whose compute nodes cannot dial out. Run it where dialling out is allowed: a login or
# transfer node, in tmux or as a service of the user. It needs one core now and then and little memory. Training goes to
# the queue, by the section launch of the silo file; silo.yaml beside this script is an example.
# Ctrl-C or SIGTERM cancels its job; started again, it goes on.
set -euo pipefail

source "$HOME/gptfl/bin/activate"  # EDIT: the virtual environment with gptfl-dist, seen by login and compute nodes
export HF_HUB_OFFLINE=1            # for the job, which inherits it

exec gptfl silo silo.yaml  # EDIT: your silo file
