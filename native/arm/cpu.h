// CPU features that the operating system lets a program use. Queried once.
#pragma once

namespace pruneofa {

bool cpu_has_dotprod();
bool cpu_has_i8mm();  // and dotprod

}  // namespace pruneofa
