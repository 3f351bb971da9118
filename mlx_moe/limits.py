"""Upper bounds of what a user may ask for: beyond every published model, and small enough to count with at once.

Whatever is within them, sizes and times can be computed exactly, every float is a normal number in float32, and no
list that the config asks for is too long to go through.
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
MAX_SEED = (1 << 63) - 1  # what NumPy, MLX and PyTorch all take

# In float32, smaller numbers lose digits and become 0, and the products of larger ones become infinite.
MIN_FLOAT, MAX_FLOAT = 1e-30, 1e30
MAX_BELOW_ONE = 1 - 2**-24  # the next number is 1 in float32

MAX_TEXT = 4096  # characters: as long as a path may be
MAX_NAME_BYTES = 200  # of a folder's name, which has 255 at most, and gets a date and an ending
