export PYTHONPATH=$PWD/kernels:$PWD/integrations:$PWD/plugins PRONGHORN_COMMIT=$(cat .gpu/sha 2>/dev/null) PRONGHORN_DIRTY=False HF_HUB_OFFLINE=1
python3 .gpu/pv.py
