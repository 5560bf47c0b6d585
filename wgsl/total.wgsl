// The sum of a vector by one workgroup, optionally its square root.
{# Inside: col < used, the vec4s of x; y has one. #}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(local_invocation_index) lid: u32) {
    var sum = vec4<f32>();
    for (var col = lid; col < {{ used }}u; col += {{ lanes }}u) {
        sum += x_load(col);
    }
    let total = across(reduce(sum, lid));
    if (lid == 0u) {
        y_store(0u, vec4<f32>({% if root %}sqrt(total){% else %}total{% endif %}, 0.0, 0.0, 0.0));
    }
}
