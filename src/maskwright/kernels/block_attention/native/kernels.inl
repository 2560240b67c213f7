// The kernels of one instruction set, put together: included by one source file per set.
#include "tiles.inl"
#include "lists.inl"
#include "forward.inl"
#include "direct.inl"
#include "brgemm.inl"
#include "backward.inl"

namespace maskwright::attention {
namespace {

template <class I, class S>
int64_t count(const Job& job, const Unit& unit) {
  const Rows<typename I::A> rows(job, unit, 1, scratch());
  return Runs(job, unit.list, keys_of(job, rows)).count();
}

template <class I, class S>
void reach(const Job& job, const Unit& unit, int64_t& start, int64_t& stop) {
  const Rows<typename I::A> rows(job, unit, 1, scratch());
  Runs(job, unit.list, keys_of(job, rows)).reach(start, stop);
}

// Use for each dtype: I's own lanes, or those of D for float64 (none: another set runs it).
template <class I, class D, class Use>
inline auto with_type(Dtype dtype, Use&& use) {
  if constexpr (!std::is_same_v<D, void>)
    if (dtype == Dtype::f64) return use.template operator()<D, double>();
  return dtype == Dtype::bf16 ? use.template operator()<I, bf16>() : use.template operator()<I, float>();
}

template <class I, class D>
Kernels kernels(const char* name) {
  Kernels k{};
  k.name = name;
  k.lanes = I::lanes;
  k.forward = [](Dtype t, const Job& job, const Unit& unit) {
    if (job.brgemm) return forward_brgemm<I>(job, unit);
    with_type<I, D>(t, [&]<class J, class S>() { forward<J, S>(job, unit); });
  };
  k.count = [](Dtype t, const Job& job, const Unit& unit) {
    return with_type<I, D>(t, [&]<class J, class S>() { return count<J, S>(job, unit); });
  };
  k.direct = [](Dtype t, const Job& job, const Part& part) {
    with_type<I, D>(t, [&]<class J, class S>() { direct<J, S>(job, part); });
  };
  k.merge = [](Dtype t, const Job& job, const Part* parts, int64_t n) {
    with_type<I, D>(t, [&]<class J, class S>() { merge<J, S>(job, parts, n); });
  };
  k.reach = [](Dtype t, const Job& job, const Unit& unit, int64_t& start, int64_t& stop) {
    with_type<I, D>(t, [&]<class J, class S>() { reach<J, S>(job, unit, start, stop); });
  };
  k.backward = [](Dtype t, const Job& job, const Unit& unit, const Gradient& g) {
    with_type<I, D>(t, [&]<class J, class S>() { backward<J, S>(job, unit, g); });
  };
  k.collect = [](Dtype t, const void* const* sums, int64_t n, int64_t width, void* to) {
    with_type<I, D>(t, [&]<class J, class S>() { collect<J, S>(sums, n, width, to); });
  };
  return k;
}

}  // namespace
}  // namespace maskwright::attention
