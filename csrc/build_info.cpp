// What this binary was built with. gradamp_fast/_extension.py reads it from the file before
// loading it: one built for another torch may load and misbehave without an error.
extern "C" __attribute__((used, visibility("default"))) const char gradamp_build_info[] =
    "gradamp_fast build {torch=" GRADAMP_TORCH_VERSION ";cuda=" GRADAMP_CUDA_VERSION
    ";archs=" GRADAMP_ARCHS ";cxx=" __VERSION__ "}";
