"""Upper bounds of settings: beyond every published model, and small enough to compute with directly.

Within them, sizes and times are computed exactly, every float is a normal float32, and every list that a config implies
is short enough to iterate over.
"""

MAX_LAYERS = 1 << 12  # DeepNet: 1,000 (Wang et al. 2022)
MAX_D_MODEL = 1 << 20  # MT-NLG: 20,480 (Smith et al. 2022)
MAX_HEADS = 1 << 16
MAX_HEAD_DIM = 1 << 16
MAX_D_FF = 1 << 24
MAX_VOCAB_SIZE = 1 << 24  # XLM-V: 901,629 (Liang et al. 2023)
MAX_CONTEXT_LENGTH = 1 << 24  # Llama 4 Scout: 10,485,760
MAX_EXPERTS = 1 << 14  # Switch-C: 2,048 (Fedus et al. 2021)
MAX_RANK = 1 << 16
MAX_PARAMETERS = 10**13  # Switch-C: 1.6 · 10¹²

MAX_PHASES = 32
MAX_STEPS = 10**10
MAX_BATCH_SIZE = 1 << 20  # sequences
MAX_DOCUMENTS = 10**12
MAX_NEW_TOKENS = 10**6
MAX_SEED = (1 << 63) - 1  # accepted by NumPy, MLX and PyTorch

# In float32, smaller numbers lose digits and underflow, and products of larger ones overflow.
MIN_FLOAT, MAX_FLOAT = 1e-30, 1e30
MAX_BELOW_ONE = 1 - 2**-24  # the next number is 1 in float32

MAX_TEXT = 4096  # characters: the maximum length of a path
MAX_NAME_BYTES = 200  # of a folder's name: at most 255, with room for a date and a suffix
