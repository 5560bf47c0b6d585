{# By one workgroup, or of `each` targets a workgroup, one row of the result each. #}
// Number of counted targets. An invocation looks at {{ (each + lanes - 1) // lanes }} of them, so that its count is exact.
{# Inside: row < rows, the number of targets; count has a row for each workgroup, and a surplus workgroup writes nothing. #}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let group = group_id(wid);
    let end = min((group + 1u) * {{ each }}u, {{ rows }}u);
    var counted = 0.0;
    for (var row = group * {{ each }}u + lid; row < end; row += {{ lanes }}u) {
        counted += select(1.0, 0.0, targets_at(row) == {{ ignore }}u);
    }
    let sum = reduce(vec4<f32>(counted, 0.0, 0.0, 0.0), lid);
    if (lid == 0u && group < {{ groups }}u) {
        count_store(group * count_stride, sum);
        for (var col = 1u; col < count_stride; col++) {
            count_store(group * count_stride + col, vec4<f32>());
        }
    }
}
