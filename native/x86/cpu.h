// CPU features that the operating system lets a program use. Queried once.
#pragma once

namespace pruneofa {

bool cpu_has_avx2();        // and FMA
bool cpu_has_avxvnni();     // and AVX2 and FMA
bool cpu_has_avx512vnni();  // and the parts of AVX-512 that the path uses
bool cpu_has_avx512bf16();  // and BF16
bool cpu_has_amx();         // and the rest of what the path uses; asks Linux for permission to use the tile registers

}  // namespace pruneofa
