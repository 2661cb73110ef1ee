"""From labels to a synthetic data set: prompts, a pre-trained generator, and Parquet shards with a manifest.

`synthesize` runs it in order, `select_images` filters it; `contact_sheet` shows what it made, `dropped_sheet` what the
filter dropped. Neither torch nor diffusers is loaded before a sample has to be made.
"""

from gptfl_dist.synthesis.contact_sheet import contact_sheet, dropped_sheet
from gptfl_dist.synthesis.generator import find_generator, load_generator
from gptfl_dist.synthesis.pipeline import PipelineGenerator
from gptfl_dist.synthesis.prompts import build_prompts
from gptfl_dist.synthesis.selection import Judge, Selection, select_images
from gptfl_dist.synthesis.speech import SpeechGenerator
from gptfl_dist.synthesis.synthesize import SyntheticSet, synthesize

__all__ = [
    "Judge",
    "PipelineGenerator",
    "Selection",
    "SpeechGenerator",
    "SyntheticSet",
    "build_prompts",
    "contact_sheet",
    "dropped_sheet",
    "find_generator",
    "load_generator",
    "select_images",
    "synthesize",
]
