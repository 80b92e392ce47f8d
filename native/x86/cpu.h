// What this CPU has and its operating system lets a program use. Asked once.
#pragma once

namespace pruneofa {

bool cpu_has_avx2();        // and FMA
bool cpu_has_avx512vnni();  // and the parts of AVX-512 that the path uses
bool cpu_has_amx();         // and the rest of what the path uses; asks Linux for permission to use the tile registers

}  // namespace pruneofa
